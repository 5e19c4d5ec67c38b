"""The look of the report: one column of cards, light or dark as the reader's system is."""

CSS = """
:root { --ink: #1b1f24; --soft: #667078; --line: #e3e6ea; --paper: #f6f7f9; --card: #ffffff; --accent: #2f6fde; --raw: #b9cdf3;
  --good: #1a7f4b; --warn: #a86400; --bad: #c22f2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #98a2ad; --line: #2d333b; --paper: #14171b;
  --card: #1c2026;  --accent: #6aa1ff; --raw: #34507f; --good: #4cc38a; --warn: #e0a33e; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 27px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 14px; margin: 20px 0 8px; color: var(--soft); font-weight: 600; }
.sub { color: var(--soft); margin: 2px 0 18px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 16px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 16px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.card b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; line-height: 1.25; }
.card span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: 13px; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td div { overflow-wrap: anywhere; }
td.n, th.n { text-align: right; white-space: nowrap; }
a { color: var(--accent); }
code, pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  overflow: auto; max-height: 480px; margin: 8px 0; }
.tag { display: inline-block; border-radius: 20px; padding: 0 10px; font-size: 13px; border: 1px solid currentColor;
  white-space: nowrap; }
.finished { color: var(--good); } .interrupted { color: var(--warn); }
.failed { color: var(--bad); } .other { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 18px 26px; }
figure { margin: 0; position: relative; min-width: 0; }
figcaption { margin-bottom: 2px; }
figcaption .last { color: var(--accent); font-variant-numeric: tabular-nums; margin-left: 6px; }
figcaption .about { color: var(--soft); font-size: 13px; margin-left: 8px; }
.log { position: absolute; right: 4px; top: 1px; color: var(--soft); font-size: 13px; cursor: pointer; z-index: 1; }
.log input { vertical-align: -1px; margin: 0; }
figure .logarithmic { display: none; }
figure:has(input:checked) .logarithmic { display: block; }
figure:has(input:checked) .linear { display: none; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); } svg .base { stroke: var(--soft); opacity: 0.5; }
svg polyline { fill: none; stroke-linejoin: round; }
svg .raw { stroke: var(--raw); stroke-width: 1.2; }
svg .smooth { stroke: var(--accent); stroke-width: 2; }
svg rect { fill: transparent; } svg circle { fill: var(--accent); opacity: 0; }
svg .point:hover circle { opacity: 1; }
.sheet { display: block; max-width: 100%; border-radius: 6px; border: 1px solid var(--line); margin: 8px 0; }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 14px; }
.videos video { width: 100%; border-radius: 6px; background: #000; display: block; image-rendering: pixelated; }
.videos figcaption { font-size: 13px; color: var(--soft); margin-top: 4px; }
.bar { position: relative; height: 20px; background: var(--paper); border-radius: 5px; overflow: hidden; min-width: 160px; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--accent); opacity: 0.85; border-radius: 5px; }
.bar i.lost { background: var(--bad); opacity: 0.22; }
.why { color: var(--soft); font-size: 13px; }
details { margin: 6px 0; } summary { cursor: pointer; }
.note { border-left: 3px solid var(--bad); padding: 2px 12px; margin: 8px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
h4 { font-size: 15px; margin: 16px 0 6px; font-weight: 600; }
h4 .about { display: block; color: var(--soft); font-weight: 400; font-size: 13px; font-variant-numeric: tabular-nums; }
.legend { font-weight: 400; margin-left: 10px; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-left: 8px; }
.key.kept { background: var(--accent); } .key.lost { background: var(--bad); opacity: 0.55; }
.key.limit { background: none; border-left: 2px dashed var(--warn); width: 2px; border-radius: 0; }
.histograms { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 20px 24px; }
.histogram { display: flex; flex-direction: column; justify-content: space-between; }
.histogram .why { font-variant-numeric: tabular-nums; } .histogram .rule { color: var(--warn); }
svg rect.kept { fill: var(--accent); } svg rect.lost { fill: var(--bad); opacity: 0.55; }
svg line.limit { stroke: var(--warn); stroke-width: 1.5; stroke-dasharray: 4 3; } svg text.limit { fill: var(--warn); }
.reasons { display: flex; flex-wrap: wrap; gap: 4px 30px; } .reason { max-width: 100%; }
.sheet-flow { display: flex; flex-wrap: wrap; gap: 14px 12px; } .sheet-flow .cell { width: 152px; }
.sheet-grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 18px 16px; }
.cell figcaption { font-size: 12.5px; line-height: 1.4; color: var(--soft); margin-top: 5px; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.cell figcaption b { color: var(--ink); font-weight: 500; }
.sheet-grid .cell figcaption > div:first-child { color: var(--ink); }
.strip { display: flex; gap: 2px; height: 104px; background: var(--paper); border-radius: 6px; overflow: hidden; }
.strip img { flex: 1; min-width: 0; height: 100%; object-fit: contain; image-rendering: auto; }
.strip.absent { align-items: center; justify-content: center; text-align: center; border: 1px dashed var(--line);
  color: var(--soft); font-size: 12.5px; line-height: 1.35; padding: 8px; overflow-wrap: anywhere; }
.sheet-grid .strip { height: 84px; }
.cell .scores { display: grid; grid-template-columns: 1fr 1fr; column-gap: 16px; font-size: 11.5px;
  line-height: 1.45; margin-top: 3px; }
.scores b { white-space: nowrap; } .scores span { display: flex; justify-content: space-between; gap: 6px; }
footer { color: var(--soft); font-size: 13px; margin-top: 24px; }
"""
