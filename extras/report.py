"""Plots and one web page from the folders that evaluate.py writes.

    python extras/report.py runs/baseline runs/agent --out report

writes report/report.png (accuracy against length, majority@k against k) and report/report.html: the tables, the plots
and every problem with its votes and traces, snippets highlighted, in one file that needs no network and no server.

500 problems x 16 traces are a lot of text, so the page carries each problem's traces compressed and unpacks them when
the problem is opened. What models wrote enters the page as text, never as HTML. Left out: rendered formulas (a
typesetter weighs more than the data) and editing.
"""

import base64
import html
import io
import json
import re
import sys
import zlib
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Parser, UserError, run_main  # noqa: E402
from evaluate import CUT, Graded, Run, at_k, interval_of, lengths, load_run, mean, pieces, report  # noqa: E402

COLOURS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
]  # told apart by everyone (Okabe, Ito)

# ---------------------------------------------------------------------------------------------------------------
# Plots


def plot(runs: list[Run], names: list[str]):
    """A figure with one row per dataset: accuracy against length with 95 % bars; majority@k against k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.axisbelow": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            len(names), 2, figsize=(11, 0.5 + 3.7 * len(names)), squeeze=False, layout="constrained"
        )
        for (left, right), name in zip(axes, names):
            most = 1
            for i, run in enumerate(runs):
                if not (scored := run.datasets.get(name)):
                    continue
                colour, k = COLOURS[i % len(COLOURS)], max(len(s.rows) for s in scored)
                right_answers, tokens = [100 * v for v in at_k(scored, k)], lengths(scored)
                x, y = mean(tokens), mean(right_answers)
                bars = [
                    [[abs(m - e)] for m, e in zip((c, c), interval_of(v))]
                    for c, v in ((x, tokens), (y, right_answers))
                ]
                left.errorbar(
                    x,
                    y,
                    xerr=bars[0] if len(scored) > 1 else None,
                    yerr=bars[1] if len(scored) > 1 else None,
                    fmt="o",
                    ms=8,
                    lw=1.4,
                    capsize=3,
                    color=colour,
                    label=run.name,
                )
                ks = list(range(1, k + 1))
                right.plot(
                    ks,
                    [100 * mean(at_k(scored, j)) for j in ks],
                    "o-",
                    ms=4,
                    color=colour,
                    label=run.name,
                )
                most = max(most, k)
            left.set(
                title=f"{name}: accuracy and length",
                xlabel="model tokens per trace",
                ylabel=f"majority@{most}, %",
            )
            right.set(title=f"{name}: votes", xlabel="k", ylabel="majority@k, %")
            right.xaxis.set_major_locator(MaxNLocator(integer=True))
            left.set_xlim(left=0)
            left.margins(x=0.15, y=0.15)
            left.set_ylim(
                max(-2, left.get_ylim()[0]), min(102, left.get_ylim()[1] + 1)
            )  # a point at 0 or 100 stays whole
            left.legend(frameon=False, fontsize=9)
    return figure


# ---------------------------------------------------------------------------------------------------------------
# Data for the page


@lru_cache(maxsize=100_000)
def highlighted(code: str) -> str:
    """Python as HTML spans; Pygments escapes it."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return highlight(code, PythonLexer(stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True))


def trace_data(row: dict, answer: str | None, verdict, most: int) -> dict:
    """One trace for the page; texts beyond `most` characters lose their middle."""
    parts, left = [], most
    for kind, text in pieces(row):
        if len(text) > left:
            text = (
                text[: left // 2]
                + f"\n[... {len(text) - left:,} characters left out ...]\n"
                + text[len(text) - left // 2 :]
            )
        left = max(400, left - len(text))
        if kind == "code":
            text = text.removeprefix("<tool_call>").removesuffix("</tool_call>").strip("\n")
            text = highlighted(text).rstrip("\n")
        elif kind == "output":
            text = text.strip("\n").removeprefix("```output\n").removesuffix("\n```")
        parts.append([kind, text])
    return {
        "sample": row["sample"],
        "answer": answer,
        "right": verdict.equal,
        "grading": verdict.status,
        "finish": row["finish"],
        "tokens": row["tokens"],
        "seconds": row["seconds"],
        "calls": [c["status"] for c in row["calls"]],
        "parts": parts,
    }


def flags(s: Graded) -> str:
    """One letter per trace: right, wrong or no answer; capital if it was cut; with ! behind it if a call failed."""
    letters = []
    for row, answer, verdict in zip(s.rows, s.answers, s.verdicts):
        letter = "r" if verdict.equal else "n" if answer is None else "w"
        failed = any(c["status"] != "ok" for c in row["calls"])
        letters.append((letter.upper() if row["finish"] in CUT else letter) + "!" * failed)
    return " ".join(letters)


def page_data(runs: list[Run], names: list[str], most: int) -> tuple[list[dict], list[str]]:
    """(what the list of problems shows, each problem's traces as base64 of deflated JSON), in the same order."""
    rows, packed = [], []
    for name in names:
        problems: dict[str, list] = {}
        for i, run in enumerate(runs):
            for s in run.datasets.get(name, ()):
                problems.setdefault(s.problem["id"], []).append((i, s))
        for pid, found in problems.items():
            first = found[0][1].problem
            rows.append(
                {
                    "dataset": name,
                    "id": pid,
                    "question": first["question"],
                    "gold": first["answer"],
                    "meta": first["meta"],
                    "runs": [
                        {
                            "run": i,
                            "flags": flags(s),
                            "credit": s.majority[-1],
                            "tokens": round(mean(lengths([s]))),
                            "calls": round(mean(len(r["calls"]) for r in s.rows), 1),
                            "votes": [[a, count, right] for a, count, _, right in s.clusters],
                        }
                        for i, s in found
                    ],
                }
            )
            traces = [
                [i, [trace_data(*t, most) for t in zip(s.rows, s.answers, s.verdicts)]]
                for i, s in found
            ]
            packed.append(
                base64.b64encode(
                    zlib.compress(json.dumps(traces, ensure_ascii=False).encode(), 6)
                ).decode()
            )
    return rows, packed


def tables(markdown: str) -> str:
    """The Markdown that evaluate.py prints (headings, paragraphs, tables) as HTML."""
    done, rows = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("| "):
            if not line.startswith("| :--"):
                rows.append(
                    [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
                )
            continue
        if rows:
            body = "".join(
                "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in r) + "</tr>"
                for i, r in enumerate(rows)
                for tag in ("th" if i == 0 else "td",)
            )
            done.append(f'<div class="scroll"><table>{body}</table></div>')
            rows = []
        if line.startswith("#"):
            done.append(f"<h3>{html.escape(line.strip('# '))}</h3>")
        elif line.strip():
            done.append(f"<p>{html.escape(line)}</p>")
    return "\n".join(done)


PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { --ink: #1d2129; --soft: #667085; --line: #dfe3ea; --paper: #fff; --tint: #f6f7f9; --right: #16845b; --wrong: #c4432b; --none: #9aa3b2; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #98a2b3; --line: #344054; --paper: #14181f; --tint: #1d232d; --right: #3ecf8e; --wrong: #ff7a5c; --none: #667085; --accent: #56b4e9; }
  .plots { background: #fff; border-radius: 6px; } }
* { box-sizing: border-box } body { margin: 0 auto; max-width: 1160px; padding: 1.2rem 1.2rem 5rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem; margin: .2rem 0 } h2 { font-size: 1.2rem; margin: 2rem 0 .6rem } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem }
p { margin: .4rem 0; color: var(--soft) } .scroll { overflow-x: auto; margin: .6rem 0 } .plots svg { width: 100%; height: auto; display: block }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9em } th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th { color: var(--soft); font-weight: 600 } th:first-child, td:first-child { text-align: left; padding-left: 0 } tr:hover td { background: var(--tint) }
summary { cursor: pointer } .bar { position: sticky; top: 0; z-index: 2; background: var(--paper); padding: .6rem 0; border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .5rem .8rem; align-items: center }
.bar label { color: var(--soft); font-size: .85em } select, input, button { font: inherit; font-size: .88em; color: var(--ink); background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: .25rem .5rem }
.bar input { flex: 1 1 10rem; min-width: 8rem } #count { margin-left: auto; color: var(--soft); font-size: .85em }
.problem { border-bottom: 1px solid var(--line) } .problem > summary { display: grid; grid-template-columns: minmax(0, 1fr) minmax(15rem, 40%); gap: .2rem 1.2rem; padding: .55rem .2rem; list-style: none; content-visibility: auto; contain-intrinsic-size: auto 3.2rem }
.problem > summary::-webkit-details-marker { display: none } .problem > summary:hover { background: var(--tint) } .q { overflow: hidden; display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow-wrap: anywhere }
.problem[open] > summary { background: var(--tint) } .small { color: var(--soft); font-size: .83em } .result { display: grid; grid-template-columns: 10px minmax(3rem, 6.5rem) 2.4rem 1fr auto; gap: .45rem; align-items: center; font-size: .85em; min-width: 0 } .result + .result { margin-top: .15rem }
.dots { display: flex; flex-wrap: wrap; gap: 2px; flex: 0 1 auto } .dots i { width: 9px; height: 13px; border-radius: 2px; background: var(--none) } .dots .r { background: var(--right) } .dots .w { background: var(--wrong) }
.dots .cut { border-radius: 2px 2px 0 0; height: 7px; align-self: flex-end } .dots .failed { box-shadow: inset 0 -3px 0 var(--ink) } .swatch { flex: none; width: 10px; height: 10px; border-radius: 50% }
.elected { font-weight: 600; white-space: nowrap; overflow: hidden; text-overflow: ellipsis } .right { color: var(--right) } .wrong { color: var(--wrong) } .none { color: var(--soft) }
.inside { padding: .4rem 0 1.2rem 1rem } .inside .question { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--ink) } .vote { display: inline-flex; gap: .4rem; border: 1px solid var(--line); border-radius: 1rem; padding: .05rem .7rem; margin: .15rem .3rem .15rem 0; font-size: .88em; max-width: 100%; overflow-wrap: anywhere }
.trace { border-left: 3px solid var(--none); margin: .35rem 0; padding-left: .7rem } .trace.r { border-color: var(--right) } .trace.w { border-color: var(--wrong) } .trace > summary { font-size: .88em; overflow-wrap: anywhere }
pre { margin: .4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace } pre.model { font: 14px/1.5 system-ui, sans-serif } pre.code { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .7rem } pre.output { border-left: 2px solid var(--accent); padding: .1rem .7rem; color: var(--soft) }
@media (max-width: 720px) { .problem > summary { grid-template-columns: 1fr } }
{{ code_style }}
@media (prefers-color-scheme: dark) { {{ dark_code_style }} }
</style></head><body>
<h1>{{ title }}</h1>
<p>{% for name, colour in legend %}<span class="swatch" style="display:inline-block;background:{{ colour }}"></span> {{ name }} &nbsp; {% endfor %}</p>
{{ summary|safe }}
<h2>Plots</h2><div class="plots">{{ svg|safe }}</div>
<details><summary><b>All tables</b></summary>{{ tables|safe }}</details>
<h2>Problems</h2>
<div class="bar">
  <label>run <select id="run"><option value="">all</option>{% for name, _ in legend %}<option value="{{ loop.index0 }}">{{ name }}</option>{% endfor %}</select></label>
  <label>dataset <select id="dataset"><option value="">all</option>{% for name in names %}<option>{{ name }}</option>{% endfor %}</select></label>
  <label>vote <select id="vote"><option value="">any</option><option value="right">right</option><option value="wrong">wrong</option><option value="tie">tied</option><option value="differ">runs differ</option></select></label>
  <label>traces <select id="trace"><option value="">any</option><option value="right">right</option><option value="wrong">wrong</option><option value="cut">truncated</option><option value="failed">with a failed call</option><option value="none">without an answer</option></select></label>
  <label>order <select id="order"><option value="">as in the set</option><option value="hard">hardest first</option><option value="long">longest first</option></select></label>
  <input id="search" type="search" placeholder="search questions, answers, ids"><span id="count"></span>
</div>
<p class="small">One block per trace: <span class="right">right</span>, <span class="wrong">wrong</span>, grey without an answer; half height was truncated; underlined has a failed call.</p>
<div id="list"></div>
<script type="application/json" id="index">{{ index|safe }}</script>
{% for chunk in packed %}<script type="text/plain" id="d{{ loop.index0 }}">{{ chunk|safe }}</script>
{% endfor %}<script>
"use strict";
const problems = JSON.parse(document.getElementById("index").textContent), names = {{ run_names|safe }}, colours = {{ colours|safe }};
const $ = id => document.getElementById(id);
const make = (tag, cls, text) => { const e = document.createElement(tag); if (cls) e.className = cls; if (text !== undefined) e.textContent = text; return e; };
const verdict = f => ({ r: "right", w: "wrong", n: "none" })[f[0].toLowerCase()];
const tests = { right: f => verdict(f) == "right", wrong: f => verdict(f) == "wrong", none: f => verdict(f) == "none", cut: f => f[0] != f[0].toLowerCase(), failed: f => f.includes("!") };
const credit = c => c > .999 ? "right" : c > .001 ? "tie" : "wrong";
for (const p of problems) for (const r of p.runs) r.list = r.flags.split(" ");
const chosen = p => p.runs.filter(r => $("run").value === "" || r.run == $("run").value);
function shown(p) {
  const rs = chosen(p), vote = $("vote").value, trace = $("trace").value, text = $("search").value.trim().toLowerCase();
  if (!rs.length || ($("dataset").value && p.dataset != $("dataset").value)) return false;
  if (vote == "differ" ? new Set(p.runs.map(r => credit(r.credit))).size < 2 : vote && !rs.some(r => credit(r.credit) == vote)) return false;
  if (trace && !rs.some(r => r.list.some(tests[trace]))) return false;
  return !text || [p.question, p.gold, p.id, ...p.runs.flatMap(r => r.votes.map(v => v[0]))].some(s => s && s.toLowerCase().includes(text));
}
function line(r) {
  const e = make("div", "result"), dot = make("span", "swatch"), dots = make("span", "dots"), top = r.votes[0];
  dot.style.background = colours[r.run % colours.length]; dot.title = names[r.run];
  for (const f of r.list) dots.append(make("i", verdict(f)[0] + (tests.cut(f) ? " cut" : "") + (tests.failed(f) ? " failed" : "")));
  e.append(dot, make("span", "elected " + (top ? credit(r.credit) == "tie" ? "" : credit(r.credit) : "none"), top ? top[0] : "no answer"),
           make("span", "small", top ? top[1] + "/" + r.list.length : ""), dots, make("span", "small", r.tokens + " tok"));
  return e;
}
const unpack = async i => JSON.parse(await new Response(new Blob([Uint8Array.from(atob($("d" + i).textContent), c => c.charCodeAt(0))]).stream().pipeThrough(new DecompressionStream("deflate"))).text());
function traceView(t, f) {
  const d = make("details", "trace " + verdict(f)[0]), s = make("summary"), bad = t.calls.filter(c => c != "ok");
  s.append(make("b", verdict(f), "#" + t.sample + " " + (t.answer ?? "no answer")),
    make("span", "small", " · " + t.tokens + " tokens, " + t.calls.length + " calls" + (bad.length ? " (failed: " + bad.join(", ") + ")" : "") + ", " + t.finish + ", " + t.seconds.toFixed(1) + " s" + (["ok", "none"].includes(t.grading) ? "" : ", grading: " + t.grading)));
  d.append(s);
  d.addEventListener("toggle", () => { if (d.childElementCount == 1) for (const [kind, text] of t.parts) {
    const e = make("pre", kind + (kind == "code" ? " hl" : "")); if (kind == "code") e.innerHTML = text; else e.textContent = text.replace(/^\n+|\s+$/g, ""); if (e.textContent) d.append(e); } });
  return d;
}
async function fill(d, p) {
  const i = problems.indexOf(p), data = await unpack(i), inside = make("div", "inside"), want = $("trace").value;
  const meta = Object.entries(p.meta).map(([k, v]) => " · " + k + " " + v).join("");
  inside.append(make("p", "question", p.question), make("p", "small", "gold " + (p.gold ?? "none") + " · id " + p.id + meta));
  for (const r of chosen(p)) {
    inside.append(make("h3", "", names[r.run]));
    const votes = make("div");
    for (const [answer, count, right] of r.votes) { const v = make("span", "vote"); v.append(make("b", right ? "right" : "wrong", answer), make("span", "small", count)); votes.append(v); }
    const silent = r.list.length - r.votes.reduce((n, v) => n + v[1], 0); if (silent) votes.append(make("span", "small", silent + " without an answer"));
    inside.append(votes);
    const traces = data.find(x => x[0] == r.run)[1], hits = traces.map((t, j) => [t, r.list[j]]).filter(([, f]) => !want || tests[want](f));
    for (const [t, f] of hits) inside.append(traceView(t, f));
    if (hits.length < traces.length) inside.append(make("p", "small", traces.length - hits.length + " other traces are hidden by the filter"));
  }
  d.querySelector(".inside")?.remove(); d.append(inside);
}
const cards = new Map();
function card(p) {
  if (cards.has(p)) return cards.get(p);
  const d = make("details", "problem"), s = make("summary"), left = make("div"), lines = make("div", "lines");
  left.append(make("div", "q", p.question), make("div", "small", p.dataset + (p.gold === null ? "" : " · gold " + p.gold)));
  s.append(left, lines); d.append(s); d.addEventListener("toggle", () => { if (d.open) fill(d, p); else d.querySelector(".inside")?.remove(); });
  cards.set(p, d); return d;
}
function draw() {
  const hits = problems.filter(shown), by = { hard: p => Math.max(...chosen(p).map(r => r.list.filter(tests.right).length / r.list.length)), long: p => -Math.max(...chosen(p).map(r => r.tokens)) }[$("order").value];
  if (by) hits.sort((a, b) => by(a) - by(b));
  $("list").replaceChildren(...hits.map(p => { const d = card(p); d.querySelector(".lines").replaceChildren(...chosen(p).map(line)); if (d.open) fill(d, p); return d; }));
  $("count").textContent = hits.length + " of " + problems.length + " problems";
}
for (const id of ["run", "dataset", "vote", "trace", "order", "search"]) $(id).addEventListener("input", draw);
draw();
</script></body></html>
"""


def page(runs: list[Run], names: list[str], markdown: str, svg: str, most: int) -> str:
    from jinja2 import Environment
    from pygments.formatters import HtmlFormatter

    rows, packed = page_data(runs, names, most)
    head, _, rest = markdown.partition("\n## ")
    safe = lambda value: json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")  # noqa: E731  inside <script>
    return (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            title="Evaluation: " + ", ".join(run.name for run in runs),
            legend=[(run.name, COLOURS[i % len(COLOURS)]) for i, run in enumerate(runs)],
            names=names,
            summary=tables(head),
            tables=tables("## " + rest),
            svg=svg,
            index=safe(rows),
            packed=packed,
            run_names=safe([run.name for run in runs]),
            colours=safe(COLOURS),
            code_style=HtmlFormatter(style="default")
            .get_style_defs(".hl")
            .replace(".hl { background: #f8f8f8; }", ""),
            dark_code_style=HtmlFormatter(style="monokai")
            .get_style_defs(".hl")
            .replace("background: #272822; ", ""),
        )
    )


def main() -> None:
    parser = Parser(
        description="Plots and one self-contained web page from the folders that evaluate.py writes."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run; the first is what the others are compared with",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="where report.png and report.html go (default: report)",
    )
    parser.add_argument(
        "--max-chars",
        type=int,
        default=40_000,
        metavar="N",
        help="longer traces lose their middle on the page (default: %(default)s)",
    )
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="where no box is found, guess the answer from the text's end",
    )
    args = parser.parse_args()
    if args.max_chars < 1000:
        raise UserError(f"--max-chars must be at least 1000, not {args.max_chars}")
    runs = [load_run(folder, args.fallback) for folder in args.runs]
    markdown = report(runs)
    names = list(dict.fromkeys(name for run in runs for name in run.datasets))
    figure, svg = plot(runs, names), io.StringIO()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out / "report.png", dpi=150)
        figure.savefig(svg, format="svg", metadata={"Date": None})
        text = page(
            runs, names, markdown, svg.getvalue()[svg.getvalue().index("<svg") :], args.max_chars
        )
        (args.out / "report.html").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from None
    print(f"{args.out / 'report.png'}\n{args.out / 'report.html'}: {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
