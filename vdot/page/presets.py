"""What can be made, what each takes, and which of the annotators' tasks makes the model's input of it."""

from dataclasses import dataclass

# Inputs a preset may show. ``clip``, ``pictures``, ``region`` (painted, boxed or as a file), ``boxes`` (where a thing
# goes), ``sides`` (where the picture grows), ``end`` (where the clip grows), ``ready`` (the clip is a control already).
INPUTS = ("clip", "pictures", "region", "boxes", "sides", "end", "ready")


@dataclass(frozen=True)
class Preset:
    """``shows`` these inputs, ``needs`` some of them; ``task`` of ``vdot.annotate``; ``example`` of assets/examples."""

    key: str
    group: str
    task: str
    shows: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    example: str = ""
    ready: str = ""  # the control that an example's clip already is


_CONTROL = {"shows": ("clip", "ready", "pictures"), "needs": ("clip",)}

PRESETS: dict[str, Preset] = {
    preset.key: preset
    for preset in (
        Preset("t2v", "words", "", example="t2v"),
        Preset("r2v", "words", "reference_anything", ("pictures",), ("pictures",), "r2v"),
        Preset("i2v", "words", "frameref", ("pictures",), ("pictures",), "firstframe"),
        Preset("depth", "control", "depth", **_CONTROL, example="depth", ready="depth"),
        Preset("pose", "control", "pose", **_CONTROL, example="pose", ready="pose"),
        Preset("flow", "control", "flow", **_CONTROL, example="flow", ready="flow"),
        Preset("scribble", "control", "scribble", **_CONTROL, example="scribble", ready="scribble"),
        Preset("gray", "control", "gray", **_CONTROL, example="gray", ready="gray"),
        Preset("layout", "control", "layout_bbox", ("clip", "boxes", "ready"), (), "layout", "layout"),
        Preset("inpaint", "edit", "inpainting", ("clip", "region", "pictures"), ("clip", "region"), "inpainting"),
        Preset("outpaint", "edit", "outpainting", ("clip", "sides"), ("clip",), "outpainting"),
        Preset("extend", "edit", "clipref", ("clip", "end"), ("clip",), "firstclip"),
        Preset("swap", "composite", "swap_anything", ("clip", "region", "pictures"), ("clip", "region", "pictures"),
               "swap_anything"),
        Preset("animate", "composite", "animate_anything", ("clip", "ready", "pictures"), ("clip", "pictures"),
               "animate_anything", "pose"),
        Preset("move", "composite", "move_anything", ("pictures", "boxes"), ("pictures", "boxes"), "move_anything"),
        Preset("expand", "composite", "expand_anything", ("pictures", "sides"), ("pictures",), "expand_anything"),
        Preset("character", "composite", "character_replacement", ("clip", "region", "pictures"),
               ("clip", "region", "pictures"), "swap_anything"),
        Preset("tryon", "composite", "try_on", ("clip", "region", "pictures"), ("clip", "region", "pictures"),
               "swap_anything"),
    )
}  # fmt: skip
CONTROLS = tuple(key for key, preset in PRESETS.items() if preset.group == "control" and key != "layout")
