"""How a page looks: two schemes by the reader's own, and room for a telephone of 360 pixels."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1f23; --soft: #59616b; --line: #dfe3e8; --card: #f5f7f9;
  --link: #0b57a4; --error-low: #fbeee4; --error-high: #9c3400; --kept-low: #e8f0f8; --kept-high: #0b4a86;
  --on-high: #fff; --on-middle: #1c1f23; --hatch: #c3cad2; --after: #9c3400; --before: #7b8794; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e7eaee; --soft: #a0a9b4; --line: #2f353c;
  --card: #1d2126; --link: #7ab8f5; --error-low: #2c2019; --error-high: #ff9e5e; --kept-low: #1a2733;
  --kept-high: #74b6f4; --on-high: #14171a; --on-middle: #14171a; --hatch: #4b545e; --after: #ff9e5e;
  --before: #8b96a3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; margin: 0; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p, ul { margin: .5rem 0; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
code, pre { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .86em; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .8rem;
  white-space: pre-wrap; margin: .4rem 0; }
.what { color: var(--soft); margin: .3rem 0 1.2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 0 0 1.2rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .8rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; line-height: 1.35; display: block; margin-top: .15rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .9rem; min-width: 100%; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
td code { overflow-wrap: break-word; }
td:first-child:has(code) { min-width: 10rem; }
td:first-child code { overflow-wrap: anywhere; }
td { min-width: 3.5rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--link); overflow-wrap: anywhere; }
summary code { word-break: break-all; }
td details { margin: 0; min-width: 12rem; }
td details[open] summary { margin-bottom: .3rem; }
.legend { color: var(--soft); font-size: .88rem; margin: .2rem 0 .6rem; }
.scale { display: inline-flex; align-items: center; gap: .4rem; color: var(--ink); margin-right: .6rem;
  font-variant-numeric: tabular-nums; }
.bar { width: 6rem; height: .8rem; border-radius: 3px; border: 1px solid var(--line);
  background: linear-gradient(to right in oklab, var(--low), var(--high)); }
.error { --low: var(--error-low); --high: var(--error-high); }
.kept { --low: var(--kept-low); --high: var(--kept-high); }
.heat { display: grid; gap: 2px; align-items: stretch; font-size: .74rem; margin-bottom: .8rem;
  grid-template-columns: max-content repeat(var(--blocks), minmax(0, 6rem)); }
.cell { display: flex; align-items: center; justify-content: center; min-height: 1.75rem; border-radius: 2px;
  color: var(--ink); background: color-mix(in oklab, var(--high) var(--v), var(--low));
  font-variant-numeric: tabular-nums; }
.middle { color: var(--on-middle); }
.high { color: var(--on-high); }
.none { background: repeating-linear-gradient(135deg, var(--hatch) 0 1px, transparent 1px 5px);
  box-shadow: inset 0 0 0 1px var(--line); }
.unknown { background: none; border: 1px dashed var(--soft); }
.swatch { display: inline-block; width: 1.3rem; min-height: .8rem; margin: 0 .3rem 0 .6rem; vertical-align: -.05em; }
.heat .cell { grid-column: var(--b); grid-row: var(--k); }
.heat .kind { grid-column: 1; grid-row: var(--k); text-align: right; padding-right: .5rem; align-self: center; }
.heat .block { grid-row: 1; grid-column: var(--b); text-align: center; color: var(--soft); white-space: nowrap; }
.many .skip { visibility: hidden; }
.many .block { overflow: visible; width: 0; justify-self: start; }
.stack { margin: .6rem 0 .2rem; color: var(--soft); }
.bars { display: grid; grid-template-columns: max-content minmax(4rem, 30rem) max-content; gap: .35rem .7rem;
  align-items: center; margin: .6rem 0; }
.track { display: block; height: 1.1rem; }
.track i { display: block; height: 100%; width: var(--w); min-width: 2px; border-radius: 3px; }
.track .before { background: var(--before); }
.track .after { background: var(--after); }
.bars b { font-variant-numeric: tabular-nums; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .2rem 1rem .7rem;
  margin: .8rem 0; }
article h3 { margin-top: .7rem; }
time { display: inline-block; white-space: nowrap; color: var(--soft);
  font-weight: 400; margin-left: .7rem; font-size: .9rem; }
dl { display: grid; grid-template-columns: minmax(6.5rem, max-content) minmax(0, 1fr); gap: .2rem .9rem;
  margin: .4rem 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft); font-size: .85rem;
  overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: 1rem .9rem 2rem; }
  h1 { font-size: 1.45rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile b { font-size: 1.3rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: .4rem; }
  article time { display: block; margin-left: 0; }
  /* Blocks go down, kinds to the right, their names upright. */
  .heat { grid-template-columns: max-content repeat(var(--kinds), minmax(0, 1fr)); }
  .heat .cell { grid-column: var(--k); grid-row: var(--b); }
  .heat .kind { grid-row: 1; grid-column: var(--k); writing-mode: vertical-rl; transform: rotate(180deg);
    justify-self: center; text-align: left; padding: .3rem 0 0; max-height: 12rem; overflow: hidden; }
  .heat .block { grid-column: 1; grid-row: var(--b); text-align: right; padding-right: .4rem; align-self: center; }
  .many .cell { min-height: .85rem; }
  .many .block { width: auto; justify-self: end; font-size: .65rem; line-height: 1; }
  .many .skip { visibility: visible; }
}
@media print { details { display: block; } .scroll { overflow: visible; } }
"""
