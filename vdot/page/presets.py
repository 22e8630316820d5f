"""What can be made, what each takes, and which of the annotators' tasks makes the model's input of it."""

from dataclasses import dataclass

# Inputs a preset may show. ``clip``, ``pictures``, ``region`` (painted, boxed or as a file), ``boxes`` (where a thing
# goes), ``sides`` (where the picture grows), ``end`` (where the clip grows), ``ready`` (the clip goes in as it is).
INPUTS = ("clip", "pictures", "region", "boxes", "sides", "end", "ready")


@dataclass(frozen=True)
class Preset:
    """``shows`` these inputs and ``needs`` some of them; ``task`` of ``vdot.annotate`` makes the model's input."""

    key: str
    group: str
    task: str
    shows: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


CONTROLS = ("depth", "pose", "flow", "scribble", "gray")
_REPLACE = ("clip", "region", "pictures")

PRESETS: dict[str, Preset] = {
    preset.key: preset
    for preset in (
        Preset("t2v", "words", ""),
        Preset("r2v", "words", "reference_anything", ("pictures",), ("pictures",)),
        Preset("i2v", "words", "frameref", ("pictures",), ("pictures",)),
        *(Preset(name, "control", name, ("clip", "ready", "pictures"), ("clip",)) for name in CONTROLS),
        Preset("layout", "control", "layout_bbox", ("clip", "boxes", "ready")),
        Preset("inpaint", "edit", "inpainting", ("clip", "region", "ready", "pictures"), ("clip", "region")),
        Preset("outpaint", "edit", "outpainting", ("clip", "sides"), ("clip",)),
        Preset("extend", "edit", "clipref", ("clip", "end"), ("clip",)),
        Preset("swap", "composite", "swap_anything", (*_REPLACE, "ready"), _REPLACE),
        Preset("animate", "composite", "animate_anything", ("clip", "ready", "pictures"), ("clip", "pictures")),
        Preset("move", "composite", "move_anything", ("pictures", "boxes"), ("pictures", "boxes")),
        Preset("expand", "composite", "expand_anything", ("pictures", "sides"), ("pictures",)),
        Preset("character", "composite", "character_replacement", (*_REPLACE, "ready"), _REPLACE),
        Preset("tryon", "composite", "try_on", (*_REPLACE, "ready"), _REPLACE),
    )
}
