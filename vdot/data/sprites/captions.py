"""A scene in words: eight English phrasings and two Chinese ones, true by construction."""

from collections.abc import Callable, Iterator

import numpy as np

from vdot.data.sprites.draw import scenes
from vdot.data.sprites.scene import Background, Scene, Split, Thing

PATTERN_NOUNS = {"striped": "stripes", "spotted": "spots", "checked": "checks"}
# Third person and participle, in two wordings; {d} is the direction.
VERBS: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "slide": (("slides{d}", "sliding{d}"), ("moves{d}", "moving{d}")),
    "bounce": (("bounces{d}", "bouncing{d}"), ("is bouncing{d}", "bouncing{d}")),
    "orbit": (("moves in a circle{d}", "moving in a circle{d}"), ("circles{d}", "circling{d}")),
    "spin": (("spins{d}", "spinning{d}"), ("rotates{d}", "rotating{d}")),
    "grow": (("grows bigger", "growing bigger"), ("gets bigger", "getting bigger")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller")),
    "stay": (("stays still", "staying still"), ("does not move", "standing still")),
    "walk": (("walks{d}", "walking{d}"), ("is walking{d}", "walking{d}")),
    "wave": (("waves a hand", "waving a hand"), ("is waving", "waving")),
    "jump": (("jumps up and down", "jumping up and down"), ("is jumping", "jumping")),
}
NOUNS = {
    "bricks": "a red brick wall",
    "wood": "a wooden wall",
    "hills": "green hills under a blue sky",
    "sea": "the sea at sunset",
    "desert": "a sandy desert",
    "mountains": "snowy mountains",
    "night": "a night sky full of stars",
    "forest": "a green forest",
}
IN = ("desert", "forest")  # one is in these, and in front of the rest

ZH_COLOURS = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "cyan": "青色", "blue": "蓝色",
    "purple": "紫色", "pink": "粉色", "brown": "棕色", "black": "黑色", "white": "白色", "grey": "灰色",
    "pale blue": "浅蓝色", "pale green": "浅绿色", "pale pink": "浅粉色", "pale yellow": "浅黄色",
    "pale purple": "浅紫色", "dark blue": "深蓝色", "dark green": "深绿色", "dark red": "深红色",
}  # fmt: skip
ZH_SHAPES = {
    "ball": "球", "square": "方块", "triangle": "三角形", "star": "星星", "heart": "爱心", "ring": "圆环",
    "cross": "十字", "moon": "月亮", "flower": "花", "hexagon": "六边形", "drop": "水滴", "arrow": "箭头",
    "house": "房子", "fish": "鱼",
}  # fmt: skip
ZH_PEOPLE = {"small": "小个子", "medium": "人", "large": "大个子"}
ZH_PATTERNS = {"striped": "条纹", "spotted": "圆点", "dotted": "圆点", "checked": "格子"}
ZH_SIZES = {"small": "小", "medium": "", "large": "大"}
ZH_WAYS = {
    "left": "左", "right": "右", "up": "上", "down": "下", "clockwise": "顺时针", "counterclockwise": "逆时针", "": "",
}  # fmt: skip
ZH_VERBS = {
    "slide": "向{d}移动", "orbit": "{d}绕圈", "spin": "{d}旋转", "grow": "逐渐变大", "shrink": "逐渐变小",
    "stay": "静止不动", "walk": "向{d}走", "wave": "挥手", "jump": "上下跳",
}  # fmt: skip
ZH_NOUNS = {
    "bricks": "红色砖墙", "wood": "木墙", "hills": "蓝天下的绿色山丘", "sea": "日落时的大海", "desert": "沙漠",
    "mountains": "雪山", "night": "布满星星的夜空", "forest": "绿色森林",
}  # fmt: skip


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def name(thing: Thing, article: bool = True) -> str:
    """ "a small red ball with white stripes" """
    size = "" if thing.size == "medium" else f"{thing.size} "
    worn = f" with {thing.second} {PATTERN_NOUNS[thing.pattern]}" if thing.second else ""
    if thing.shape == "person":
        words = f"{size}person in {_article(thing.colour)} shirt{worn}"
    else:
        words = f"{size}{thing.colour} {thing.shape}{worn}"
    return _article(words) if article else words


def _direction(thing: Thing) -> str:
    motion = thing.motion
    if motion.direction in ("left", "right"):
        return f" to the {motion.direction}"
    return f" {motion.direction}" if motion.direction else " up and down"


def _does(thing: Thing, form: int, wording: int) -> str:
    """The motion as "slides to the left" (form 0) or "sliding to the left" (form 1)."""
    return VERBS[thing.motion.kind][wording][form].format(d=_direction(thing))


def background_noun(background: Background) -> str:
    first, second = background.first, background.second
    if background.kind == "plain":
        return f"a plain {first} background"
    if background.kind == "gradient":
        return f"a gradient from {first} to {second}"
    if background.second:
        return f"{_article(first)} and {second} {background.kind} background"
    return NOUNS[background.kind]


def _place(background: Background) -> str:
    return f"{'in' if background.kind in IN else 'in front of'} {background_noun(background)}"


def _clauses(scene: Scene, form: int, wording: int, article: bool = True) -> list[str]:
    """Each thing and what it does: "a red ball slides up", or with "sliding"."""
    things = scene.things
    clauses = [f"{name(thing, article)} {_does(thing, form, wording)}" for thing in things]
    if scene.crossing:
        back = things[1]
        passes = ("and passes", "and passing")[form]
        behind = f"{name(back)} that {_does(back, 0, wording)}"
        clauses[:2] = [f"{clauses[0]} {passes} in front of {behind}"]
    return clauses


def _things(scene: Scene, form: int, wording: int) -> str:
    """The clauses as one; after a relative clause ("that slides") only a comma keeps the next one apart."""
    *first, last = _clauses(scene, form, wording)
    return f"{', '.join(first)}{', ' if scene.crossing else ' '}and {last}" if first else last


def _camera(scene: Scene, lead: str) -> str:
    way = scene.camera if scene.camera in ("up", "down", "") else f"to the {scene.camera}"
    return f"{lead}the camera pans {way}" if way else ""


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _statement(scene: Scene, wording: int) -> str:
    return _sentence(f"{_things(scene, 0, wording)} {_place(scene.background)}{_camera(scene, ' while ')}")


def _fronted(scene: Scene, wording: int) -> str:
    return _sentence(f"{_place(scene.background)}, {_things(scene, 0, wording)}{_camera(scene, ', and ')}")


def _video(scene: Scene, wording: int) -> str:
    things = _things(scene, 1, wording)
    return _sentence(f"a video of {things} {_place(scene.background)}{_camera(scene, ' as ')}")


def _sentences(scene: Scene, wording: int) -> str:
    parts = _clauses(scene, 0, wording)
    parts += [f"the background is {background_noun(scene.background)}"]
    parts += [_camera(scene, "")] if scene.camera else []
    return " ".join(map(_sentence, parts))


def _scenery(scene: Scene, wording: int) -> str:
    things = _things(scene, 1, wording)
    return _sentence(f"{background_noun(scene.background)}, with {things}{_camera(scene, ', as ')}")


def _tags(scene: Scene, wording: int) -> str:
    parts = [*_clauses(scene, 1, wording, article=False), background_noun(scene.background)]
    return ", ".join(parts + ([f"camera panning {scene.camera}"] if scene.camera else []))


def _zh_name(thing: Thing) -> str:
    pattern = f"带{ZH_COLOURS[thing.second]}{ZH_PATTERNS[thing.pattern]}的" if thing.second else ""
    if thing.shape == "person":
        return f"一个穿{pattern}{ZH_COLOURS[thing.colour]}上衣的{ZH_PEOPLE[thing.size]}"
    return f"一个{pattern}{ZH_COLOURS[thing.colour]}{ZH_SIZES[thing.size]}{ZH_SHAPES[thing.shape]}"


def _zh_does(thing: Thing) -> str:
    way = ZH_WAYS[thing.motion.direction]
    if thing.motion.kind == "bounce":
        return f"向{way}弹跳" if way else "上下弹跳"
    return ZH_VERBS[thing.motion.kind].format(d=way)


def _zh_background(background: Background) -> str:
    first, second = ZH_COLOURS.get(background.first, ""), ZH_COLOURS.get(background.second, "")
    if background.kind == "plain":
        return f"纯{first}背景"
    if background.kind == "gradient":
        return f"从{first}到{second}的渐变背景"
    if background.second:
        return f"{first}和{second}的{ZH_PATTERNS[background.kind]}背景"
    return ZH_NOUNS[background.kind]


def _zh_clauses(scene: Scene) -> str:
    clauses = [f"{_zh_name(thing)}{_zh_does(thing)}" for thing in scene.things]
    if scene.crossing:
        back = scene.things[1]
        clauses[:2] = [f"{clauses[0]}，从{_zh_does(back)}的{_zh_name(back)}前面经过"]
    return "，".join(clauses)


def _zh_after(scene: Scene, wording: int) -> str:
    camera = f"，镜头向{ZH_WAYS[scene.camera]}移动" if scene.camera else ""
    return f"{_zh_clauses(scene)}，背景是{_zh_background(scene.background)}{camera}。"


def _zh_before(scene: Scene, wording: int) -> str:
    camera = f"，镜头向{ZH_WAYS[scene.camera]}移动" if scene.camera else ""
    return f"在{_zh_background(scene.background)}前，{_zh_clauses(scene)}{camera}。"


Phrasing = tuple[Callable[[Scene, int], str], int]  # and which of the two wordings of the verbs
ENGLISH: tuple[Phrasing, ...] = (
    (_statement, 0),
    (_fronted, 1),
    (_video, 0),
    (_sentences, 0),
    (_scenery, 1),
    (_tags, 0),
    (_statement, 1),
    (_video, 1),
)
CHINESE: tuple[Phrasing, ...] = ((_zh_after, 0), (_zh_before, 0))
PHRASINGS = ENGLISH + CHINESE


def caption(scene: Scene, variant: int | np.random.Generator = 0) -> str:
    """One phrasing: a number (the Chinese ones are the last two of :data:`PHRASINGS`), or drawn."""
    index = int(variant.integers(len(PHRASINGS))) if isinstance(variant, np.random.Generator) else variant
    phrase, wording = PHRASINGS[index]
    return phrase(scene, wording)


def corpus(count: int, split: Split = "train", start: int = 0) -> Iterator[str]:
    """Captions alone, quickly: of ``count`` scenes from seed ``start`` on, one phrasing each in turn."""
    return (caption(scene, i % len(PHRASINGS)) for i, scene in enumerate(scenes(start, count, split)))
