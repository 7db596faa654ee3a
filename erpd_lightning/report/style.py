"""The style of the report's page."""

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #24292f; --soft: #57606a; --line: #d8dee4;
  --note: #fff4d6; --k1: #fff0b3; --k2: #ffd27f; --k3: #ffa860; --k4: #f47c5c; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --text: #d6dce3; --soft: #9aa5b1; --line: #343c46;
    --note: #3a3115; --k1: #38341c; --k2: #5a4513; --k3: #7d4a0e; --k4: #9c3a22; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
figure { margin: 1rem 0; max-width: 620px; }
img { display: block; max-width: 100%; height: auto; }
figcaption, .caption { color: var(--soft); font-size: .875rem; margin: .5rem 0 0; max-width: 70ch;
  overflow-wrap: anywhere; }
.grid { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.table { overflow-x: auto; margin: 1rem 0 .5rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; white-space: normal; min-width: 7rem; font-weight: 600; color: var(--soft); }
.word { text-align: left; min-width: 0; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
.note { background: var(--note); padding: .6rem .8rem; border-radius: .3rem; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); }
.sample { border-left: 3px solid var(--line); padding: 0 0 0 .8rem; margin: 1.25rem 0; }
.sample p { margin: .3rem 0; overflow-wrap: anywhere; }
.prompt, .tokens { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap; }
.answer, small { color: var(--soft); font-size: .875rem; }
.k1 { background: var(--k1); } .k2 { background: var(--k2); } .k3 { background: var(--k3); }
.k4 { background: var(--k4); text-decoration: underline; }
"""
