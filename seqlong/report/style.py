"""The style sheet of the report: system fonts, light, dark and print from one set of variables."""

STYLE = """
:root {
  color-scheme: light dark;
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Helvetica, Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", SFMono-Regular, Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono", monospace;
  --paper: #ffffff; --raised: #f6f7f8; --ink: #14191f; --muted: #5d6772; --grid: #dfe3e7; --rule: #e4e7ea;
  --train: #1767b3; --val: #c2490b; --floor: #6d5a8c; --bad: #b3261e; --good: #17733c; --warn: #8a5a00;
  --m0: #1f8a7d; --m1: #7a5bb5; --m2: #b98a16; --m3: #b8467f; --m4: #4c78b8; --m5: #6f8f2f; --m6: #b4603a;
  --m7: #7d838b;
  --on: #ffffff;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #12161b; --raised: #1a2027; --ink: #e8ebee; --muted: #9aa5b1; --grid: #2b333c; --rule: #28303a;
    --train: #5fabf2; --val: #f59a5c; --floor: #b5a3d6; --bad: #f2857d; --good: #66c48b; --warn: #e0b354;
    --m0: #4fb8aa; --m1: #a98be0; --m2: #dcb14a; --m3: #e082b0; --m4: #7ea6e0; --m5: #a3c460; --m6: #dd9270;
    --m7: #a3a9b1;
    --on: #10141a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 var(--sans);
  font-variant-numeric: tabular-nums; }
main { max-width: 1040px; margin: 0 auto; padding: 52px 36px 72px; }
header { margin-bottom: 34px; }
.eyebrow { display: flex; gap: 12px; align-items: center; flex-wrap: wrap; color: var(--muted); font-size: 13px;
  margin-bottom: 10px; }
.status { font-weight: 600; font-size: 12.5px; padding: 2px 10px 2px 8px; border-radius: 99px; border: 1px solid;
  display: inline-flex; align-items: center; gap: 6px; }
.status::before { content: ""; width: 7px; height: 7px; border-radius: 50%; background: currentColor; }
.status.finished { color: var(--good); } .status.failed { color: var(--bad); } .status.stopped { color: var(--warn); }
.status.running, .status.unknown { color: var(--muted); }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 10px; font-weight: 680;
  overflow-wrap: anywhere; text-wrap: balance; }
h2 { font-size: 19px; letter-spacing: -0.01em; margin: 0 0 4px; font-weight: 650; }
h3 { font-size: 13.5px; margin: 0 0 2px; font-weight: 600; }
p { margin: 0 0 10px; max-width: 76ch; }
.lead { font-size: 18px; line-height: 1.5; color: var(--ink); max-width: 62ch; text-wrap: pretty; }
.note { color: var(--muted); font-size: 13.5px; }
section { margin-top: 44px; padding-top: 22px; border-top: 1px solid var(--rule); }
.verdict { display: grid; grid-template-columns: auto 1fr; gap: 28px; align-items: center; margin: 26px 0 4px;
  padding: 20px 24px;
  background: var(--raised); border-radius: 10px; }
.verdict .figure { font-size: 50px; line-height: 1; font-weight: 680; letter-spacing: -0.03em; }
.verdict .unit { color: var(--muted); font-size: 13px; margin-top: 6px; }
.verdict ul { margin: 0; padding: 0; list-style: none; } .verdict li { margin: 3px 0; text-wrap: pretty; }
.verdict b { font-weight: 650; }
.better { color: var(--good); font-weight: 650; } .worse { color: var(--warn); font-weight: 650; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 18px 24px;
  margin: 22px 0 0; }
.facts .value { font-size: 20px; font-weight: 620; letter-spacing: -0.01em; line-height: 1.25; }
.facts .label { color: var(--muted); font-size: 12.5px; }
.facts .small { color: var(--muted); font-size: 12.5px; }
.error { border-left: 3px solid var(--bad); background: var(--raised); padding: 14px 18px; margin: 22px 0 0;
  border-radius: 0 8px 8px 0; }
.error h3 { color: var(--bad); }
.error.stopped { border-color: var(--warn); } .error.stopped h3 { color: var(--warn); }
pre { font: 12.5px/1.55 var(--mono); margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: 0.9em var(--mono); overflow-wrap: anywhere; }
.chart svg { display: block; width: 100%; height: auto; overflow: visible; }
.chart { margin: 10px 0 0; }
.grid { display: grid; grid-template-columns: 1fr 1fr; gap: 26px 36px; margin-top: 16px; }
.grid > div { min-width: 0; break-inside: avoid; }
.strip { display: flex; flex-wrap: wrap; gap: 3px; margin: 14px 0 16px; }
.cell { flex: 1 1 30px; max-width: 74px; min-width: 24px; height: 54px; border-radius: 4px; color: var(--on);
  font: 600 14px var(--mono);
  display: flex; align-items: center; justify-content: center; position: relative; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.end { flex: 0 0 auto; height: 54px; padding: 0 10px; border: 1px solid var(--grid); border-radius: 4px;
  color: var(--muted); font-size: 12px;
  display: flex; align-items: center; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px;
  vertical-align: -1px;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.k0 { background: var(--m0); } .k1 { background: var(--m1); } .k2 { background: var(--m2); }
.k3 { background: var(--m3); }
.k4 { background: var(--m4); } .k5 { background: var(--m5); } .k6 { background: var(--m6); }
.k7 { background: var(--m7); }
.s0 { background: var(--train); fill: var(--train); } .s1 { background: var(--val); fill: var(--val); }
.s2 { background: var(--ink); fill: var(--ink); } .s3 { background: var(--floor); fill: var(--floor); }
.s4 { background: var(--muted); fill: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin: 10px 0 6px; }
th { text-align: left; font-weight: 550; color: var(--muted); font-size: 12.5px; padding: 5px 22px 5px 0;
  border-bottom: 1px solid var(--grid);
  white-space: nowrap; }
td { padding: 6px 22px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td.path { overflow-wrap: anywhere; }
th.n, td.n { text-align: right; white-space: nowrap; } th:last-child, td:last-child { padding-right: 0; }
.contigs { display: grid; grid-template-columns: max-content 1fr max-content; gap: 7px 14px; align-items: center;
  margin: 14px 0 10px;
  font-size: 13px; }
.contigs .name { max-width: 240px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.contigs .size { color: var(--muted); text-align: right; }
.contigs svg { display: block; width: 100%; height: 18px; border-radius: 3px; background: var(--grid);
  print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13px; color: var(--muted); margin: 6px 0; }
.pairs { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 6px 24px; font-size: 14px;
  margin: 12px 0; }
.pairs dt { color: var(--muted); } .pairs dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 12px; border: 1px solid var(--rule); border-radius: 8px; }
summary { cursor: pointer; padding: 10px 16px; font-weight: 550; font-size: 14px; }
summary:focus-visible { outline: 2px solid var(--train); outline-offset: 2px; border-radius: 8px; }
details > :not(summary) { margin: 0 16px 14px; }
.key { color: var(--train); } .comment { color: var(--muted); }
footer { margin-top: 52px; color: var(--muted); font-size: 12.5px; }
@media (max-width: 720px) {
  main { padding: 28px 18px 48px; } .grid { grid-template-columns: 1fr; } .verdict { grid-template-columns: 1fr;
  gap: 12px; }
  h1 { font-size: 26px; } .pairs { grid-template-columns: 1fr; gap: 0; } .pairs dd { margin-bottom: 8px; }
  #loss .chart { overflow-x: auto; } #loss .chart svg { min-width: 640px; }
}
@media print {
  @page { margin: 14mm; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  section { margin-top: 24px; padding-top: 14px; } h2, h3 { break-after: avoid; }
  .verdict, .strip, .chart, tr { break-inside: avoid; }
  details { border: 0; } details::details-content { content-visibility: visible; height: auto; }
  summary { padding-left: 0; list-style: none; }
  details > :not(summary) { margin: 0; } pre { font-size: 8.5pt; }
}
"""
