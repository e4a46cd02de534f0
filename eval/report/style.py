"""The look of the report: light and dark by the reader's setting, from 400 pixels up, color-blind-safe (Okabe-Ito)."""

CSS = """
:root { --page: #ffffff; --ink: #1b1f24; --soft: #5b6570; --line: #d5dae0; --panel: #f4f6f8;
  --good: #005a8c; --bad: #a34700; --unclear: #7a5c00;
  --series0: #0072b2; --series1: #d55e00; --series2: #009e73; --series3: #cc79a7; --series4: #8a6d00; --series5: #56b4e9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --ink: #e6e9ec; --soft: #9ba5af; --line: #363d45; --panel: #1d2228;
    --good: #6cc3f5; --bad: #ffa05c; --unclear: #e0c240;
    --series0: #56b4e9; --series1: #ff8c42; --series2: #2fc99b; --series3: #e39ac4; --series4: #e0c240; --series5: #9ecbff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
h4 { font-size: .85rem; margin: 0 0 .2rem; }
.verdict { font-size: 1.1rem; background: var(--panel); border-left: 4px solid var(--series0); padding: .7rem .9rem; margin: 0; }
.verdict p { margin: 0 0 .4rem; } .verdict p:last-child { margin: 0; }
.note, .skipped, summary, small { color: var(--soft); }
.note { font-size: .85rem; margin: .5rem 0; }
.paper { color: var(--soft); font-style: italic; }
.skipped { font-style: italic; }
summary { cursor: pointer; font-size: .9rem; padding: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
tbody th { font-weight: 400; white-space: normal; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--page); min-width: 6.5rem; }
tr.group th { font-weight: 600; padding-top: .9rem; }
tr.group span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 3rem); }
th.difference { padding-left: 1rem !important; color: var(--soft); }
td small, th small { display: block; font-size: .72rem; font-weight: 400; white-space: nowrap; }
td.good { color: var(--good); font-weight: 600; } td.bad { color: var(--bad); font-weight: 600; }
td.good small, td.bad small { font-weight: 400; }
td.none { color: var(--soft); }
.light { display: inline-block; border-radius: 4px; padding: 0 .45rem; font-size: .85rem; font-weight: 600; border: 1px solid transparent; }
.light.better { background: var(--good); color: var(--page); } .light.worse { background: var(--bad); color: var(--page); }
.light.unclear { border-color: var(--unclear); color: var(--unclear); }
.light.baseline, .light.skipped { color: var(--soft); font-weight: 400; } .light.failed { border-color: var(--bad); color: var(--bad); }
.lights td.paper { white-space: normal; min-width: 8rem; }
td.why, .every tr.group th { white-space: normal; } td.why { text-align: left; min-width: 8rem; } td.why small { white-space: normal; }
figure { margin: .5rem 0; max-width: 560px; }
svg { display: block; width: 100%; height: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: .5rem 1rem; }
article { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: .8rem 0; }
article .note { margin: 0 0 .3rem; }
pre { margin: 0; font: .82rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto; }
pre.prompt { background: var(--panel); padding: .4rem .6rem; border-radius: 4px; margin-bottom: .6rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 210px), 1fr)); gap: .6rem 1rem; }
.answers small { font-weight: 400; }
.time { width: 100%; max-width: 560px; } .time th:first-child { width: 9rem; }
.bar { width: 60%; } .bar span { display: block; height: .8rem; margin-top: .3rem; min-width: 1px; background: var(--series0); border-radius: 2px; }
tr.total > * { border-bottom: 0; font-weight: 600; }
dt { font-weight: 600; font-size: .85rem; } dd { margin: 0 0 .5rem; font-size: .85rem; }
ul { padding-left: 1.1rem; font-size: .85rem; overflow-wrap: anywhere; }
@media (max-width: 520px) {
  main { padding: .7rem; }
  table { font-size: .8rem; } th, td { padding: .25rem .3rem; } thead th { white-space: normal; vertical-align: bottom; }
  th:first-child { min-width: 5.5rem; }
  .light { font-size: .68rem; padding: 0 .2rem; } .lights th:first-child { min-width: 5rem; }
  td small, thead small { white-space: normal; max-width: 4.2rem; margin-left: auto; font-size: .68rem; }
}
"""
