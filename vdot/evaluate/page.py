"""Results as one HTML file that needs nothing else: sortable tables, bars, videos beside what they were made from."""

import base64
import html
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from vdot.data.sprites.tasks import TaskClip
from vdot.evaluate.cases import Case
from vdot.evaluate.kept import generated
from vdot.evaluate.report import ALL
from vdot.evaluate.results import FORMULA, NOT_MEASURED, SCORE, VBENCH_AVERAGE, Mean, Measured, Results, task_groups
from vdot.evaluate.uvcbench import PAPER, SCALES, SCORED
from vdot.video import from_model, letterbox, write_video

TALL, LONG = 112, 41  # pixels and frames of a preview, at most
GAP = 4  # white pixels between pictures
TINT = np.array([255, 60, 60], np.float32)  # what a mask generates, a third of it

# --- videos ----------------------------------------------------------------------------------------------------------


def panels(case: TaskClip | Case, frames: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """What a sample was made from, tinted where the mask generates, the truth if known, and what came of it."""
    height, width = frames.shape[1:3]
    shown = []
    if case.src_video is not None:
        source = case.src_video
        if case.src_mask is not None:
            tinted = (source * np.float32(2 / 3) + TINT / 3).astype(np.uint8)
            source = np.where(generated(case.src_mask)[..., None], tinted, source)
        shown.append(("source" if case.src_mask is None else "source, red is generated", source))
    for picture in case.references:
        still = from_model(letterbox(picture, height, width))
        shown.append(("reference", np.repeat(still, len(frames), axis=0)))
    if case.video is not None:
        shown.append(("truth", case.video))
    return [*shown, ("result", frames)]


def preview(case: TaskClip | Case, frames: np.ndarray, fps: float = 8.0) -> tuple[str, bytes]:
    """The panels side by side, in one small mp4 so that they play together, and their names."""
    shown = panels(case, frames)
    picked = np.unique(np.rint(np.linspace(0, len(frames) - 1, min(LONG, len(frames)))).astype(int))
    tall = min(TALL, frames.shape[1])
    wide = max(1, round(frames.shape[2] * tall / frames.shape[1]))
    white = np.full((tall, GAP, 3), 255, np.uint8)
    rows = []
    for t in picked:
        parts = [cv2.resize(clip[t], (wide, tall), interpolation=cv2.INTER_AREA) for _, clip in shown]
        rows.append(np.concatenate([piece for part in parts for piece in (part, white)][:-1], axis=1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preview.mp4"
        write_video(path, np.stack(rows), max(fps * len(picked) / len(frames), 1.0))
        return " | ".join(name for name, _ in shown), path.read_bytes()


# --- tables ----------------------------------------------------------------------------------------------------------


def _e(text: object) -> str:
    return html.escape(str(text))


def _number(value: float | None, form: str = ".4g") -> str:
    """A table cell; what was not measured sorts last."""
    if value is None:
        return f'<td class="none">{NOT_MEASURED}</td>'
    return f'<td class="n" data-v="{float(value)!r}">{value:{form}}</td>'


def _table(head: Sequence[tuple[str, str]], rows: Iterable[str], name: str) -> str:
    """``head``: titles with what they mean."""
    titles = "".join(f'<th title="{_e(about)}" tabindex="0">{_e(title)}</th>' for title, about in head)
    return f'<table id="{_e(name)}"><thead><tr>{titles}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _bar(cell: Mean | None) -> str:
    if cell is None:
        return f'<td class="none">{NOT_MEASURED}</td>'
    span = f"left:{cell.low:.2f}%;width:{max(cell.high - cell.low, 0):.2f}%"
    title = f"{cell.mean:.2f}, {cell.low:.2f} to {cell.high:.2f}"
    return (
        f'<td data-v="{float(cell.mean)!r}" class="barcell" title="{title}"><div class="bar">'
        f'<i style="width:{cell.mean:.2f}%"></i><b style="{span}"></b></div><span>{cell.mean:.1f}</span></td>'
    )


def _overview(results: Results) -> str:
    head = [("task", ""), ("score", FORMULA), *((group, f"{group}, 0..100") for group in SCORED)]
    head += [("VBench average", "100 x mean of VBench's six dimensions"), *((f"paper: {who}", "") for who in PAPER)]
    head += [("evaluations", SCALES["evaluations"].about), ("seconds", SCALES["seconds"].about), ("samples", "")]
    rows = []
    for task in [*results.tasks, ALL]:
        cells, groups = results.cells[task], task_groups(results, task)
        asked = sum(task in (ALL, sample.task) for sample in results.samples)
        known = cells[SCORE].n if SCORE in cells else 0
        name = f'<td><a href="#task-{_e(task)}">{_e(task)}</a></td>' if task != ALL else "<td><strong>all</strong></td>"
        told = [_number(numbers.get(task), ".2f") if task in numbers else "<td></td>" for numbers in PAPER.values()]
        rest = (cells[n].mean if n in cells else None for n in ("evaluations", "seconds"))
        rows.append(
            f"<tr>{name}{_bar(cells.get(SCORE))}"
            + "".join(_number(groups[g], ".1f") if g in groups else "<td></td>" for g in SCORED)
            + _bar(cells.get(VBENCH_AVERAGE))
            + "".join(told)
            + "".join(_number(value) for value in rest)
            + f'<td class="n" data-v="{known}">{known} of {asked}</td></tr>'
        )
    return _table(head, rows, "overview")


def _metrics(results: Results) -> str:
    head = [(title, "") for title in ("metric", "group", "what", "unit", "better", "0 at", "1 at", "source", "needs")]
    head += [("mean", "over tasks"), ("95%", ""), ("samples", "")]
    rows = []
    for name, scale in SCALES.items():
        cell = results.cells[ALL].get(name)
        anchors = "".join("<td>not scored</td>" if a is None else _number(a) for a in (scale.worst, scale.best))
        words = "".join(f"<td>{_e(text)}</td>" for text in (name, scale.group, scale.about, scale.unit, scale.better))
        span = "<td></td>" if cell is None else f"<td>{cell.low:.4g} to {cell.high:.4g}</td>"
        found = _number(None if cell is None else cell.mean) + span
        rows.append(
            f"<tr>{words}{anchors}<td>{_e(scale.source)}</td><td>{_e(scale.needs)}</td>{found}"
            f'<td class="n" data-v="{cell.n if cell else 0}">{cell.n if cell else 0}</td></tr>'
        )
    return _table(head, rows, "metrics")


def _task(results: Results, task: str, previews: Mapping[str, tuple[str, bytes]]) -> str:
    """Its samples as a table, and the worst of them to look at."""
    rows = results.worst_first(task)
    names = [name for name in SCALES if name in results.cells[task]]
    head = [("sample", ""), ("score", FORMULA), *((name, SCALES[name].about) for name in names), ("prompt", "")]
    lines = []
    for row in rows:
        link = f'<a href="{_e(row.key)}.mp4">{_e(row.sample_id)}</a>'
        if row.message:
            lines.append(
                f'<tr class="failed"><td>{_e(row.sample_id)}</td><td class="none">{NOT_MEASURED}</td>'
                f'<td colspan="{len(names)}">{_e(row.message)}</td>{_prompt(row)}</tr>'
            )
            continue
        cells = "".join(_number(row.values.get(name)) for name in names)
        lines.append(f"<tr><td>{link}</td>{_number(row.score, '.1f')}{cells}{_prompt(row)}</tr>")
    videos = "".join(_figure(row, *previews[row.key]) for row in rows if row.key in previews)
    shown = sum(row.key in previews for row in rows)
    return (
        f'<section id="task-{_e(task)}"><h2>{_e(task)}</h2>'
        f"<h3>Worst first{'' if shown == len(rows) else f', {shown} of {len(rows)}'}</h3>"
        f'<div class="videos">{videos}</div>{_table(head, lines, f"samples-{task}")}</section>'
    )


def _prompt(row: Measured) -> str:
    return f'<td class="p" title="{_e(row.prompt)}">{_e(row.prompt)}</td>'


def _figure(row: Measured, names: str, video: bytes) -> str:
    data = base64.b64encode(video).decode()
    score = NOT_MEASURED if row.score is None else f"{row.score:.1f}"
    words = f"<strong>{_e(row.sample_id)}: {score}</strong> {_e(names)}<br>{_e(row.prompt)}"
    switches = 'muted loop controls playsinline preload="metadata"'
    return (
        f'<figure><video {switches} src="data:video/mp4;base64,{data}"></video>'
        f"<figcaption>{words}</figcaption></figure>"
    )


def render(results: Results, previews: Mapping[str, tuple[str, bytes]]) -> str:
    """The whole page; ``previews`` by sample, of those that are shown."""
    manifest = results.manifest
    hashes = "".join(f"<dt>{_e(k)}</dt><dd><code>{_e(v)}</code></dd>" for k, v in manifest.get("hashes", {}).items())
    problems = "".join(f"<li>{_e(problem)}</li>" for problem in manifest.get("bad_rows", []))
    notes = sorted({f"{k}: {v}" for sample in results.samples for k, v in (sample.notes or {}).items()})
    told = {k: v for k, v in manifest.items() if k not in ("samples", "videos", "hashes")}
    return "".join((
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>UVCBench results</title>',
        '<meta name="viewport" content="width=device-width">', f"<style>{_STYLE}</style>",
        f"<h1>Benchmark results</h1><dl>{hashes}</dl>",
        "<p>Equal hashes: the same benchmark, model and settings, way of measuring, and videos. "
        "A click on a title sorts.</p>",
        _overview(results), f"<p>{_e(FORMULA)}</p>",
        "<p>The paper's numbers are of VBench on the published benchmark with the published weights; they compare with "
        "the column VBench average of such a run, and with nothing else here.</p>",
        f"<h2>Rows that could not be used</h2><ul>{problems}</ul>" if problems else "",
        f"<h2>Controls made again by</h2><ul>{''.join(f'<li>{_e(note)}</li>' for note in notes)}</ul>" if notes else "",
        *(_task(results, task, previews) for task in results.tasks),
        "<h2>Metrics</h2>", _metrics(results),
        f"<h2>Run</h2><pre>{_e(json.dumps(told, indent=1, ensure_ascii=False))}</pre>",
        f"<script>{_SCRIPT}</script></html>\n",
    ))  # fmt: skip


_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:24px;color:#1b1d22;background:#fff;max-width:1600px}
table{border-collapse:collapse;display:block;overflow-x:auto;margin:12px 0}
th,td{padding:3px 8px;border-bottom:1px solid #e3e5ea;text-align:left;vertical-align:top}
th{cursor:pointer;background:#f4f5f8;user-select:none;white-space:nowrap}
th[aria-sort=ascending]::after{content:" \\25b2"}th[aria-sort=descending]::after{content:" \\25bc"}
td.n{text-align:right;font-variant-numeric:tabular-nums}td.none{color:#9aa0ab;white-space:nowrap}
td.p{max-width:28em;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}tr.failed{background:#fff2f0}
.barcell{white-space:nowrap}.bar{display:inline-block;position:relative;width:110px;height:11px;background:#eceef2}
.bar i{position:absolute;left:0;top:0;bottom:0;background:#3d7bd9}
.bar b{position:absolute;top:4px;height:3px;background:#12305c}.barcell span{margin-left:6px}
.videos{display:flex;flex-wrap:wrap;gap:14px}figure{margin:0;max-width:420px}
video{width:400px;image-rendering:pixelated;background:#000}figcaption{font-size:12px}
dl{display:grid;grid-template-columns:max-content auto;gap:2px 12px}dd{margin:0}
pre{overflow-x:auto;background:#f4f5f8;padding:8px}
"""
_SCRIPT = """
function sort(th){
  const table=th.closest("table"),body=table.tBodies[0],at=[...th.parentNode.children].indexOf(th);
  const up=th.getAttribute("aria-sort")!=="ascending";
  const key=row=>{const c=row.cells[at];if(!c||c.classList.contains("none"))return null;
    return c.dataset.v!==undefined?parseFloat(c.dataset.v):c.textContent};
  const order=(a,b)=>{const x=key(a),y=key(b);if(x===null||y===null)return (x===null)-(y===null);
    const d=typeof x==="number"&&typeof y==="number"?x-y:String(x).localeCompare(String(y));return up?d:-d};
  [...body.rows].sort(order).forEach(row=>body.append(row));
  table.querySelectorAll("th").forEach(h=>h.removeAttribute("aria-sort"));
  th.setAttribute("aria-sort",up?"ascending":"descending");
}
document.querySelectorAll("th").forEach(th=>{
  th.addEventListener("click",()=>sort(th));
  th.addEventListener("keydown",e=>{if(e.key==="Enter")sort(th)});
});
const seen=new IntersectionObserver(list=>list.forEach(e=>{
  if(e.isIntersecting)e.target.play().catch(()=>{});else e.target.pause();}));
document.querySelectorAll("video").forEach(v=>seen.observe(v));
"""
