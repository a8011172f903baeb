"""The page's style sheet: light and dark, from a phone's width up."""

CSS = """
:root {
  --paper: #fcfcfa; --card: #ffffff; --ink: #1f2430; --quiet: #5b6472; --line: #e3e6ea;
  --accent: #2f4b9b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171d; --card: #1c2028; --ink: #e8eaee; --quiet: #a3abb8; --line: #303642;
    --accent: #9db4ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1000px; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: clamp(1.8rem, 5vw, 2.6rem); line-height: 1.15; margin: 0 0 .6rem; }
h2 { font-size: 1.45rem; line-height: 1.25; margin: 3.2rem 0 .4rem; }
p { margin: .6rem 0 1rem; max-width: 70ch; }
.lead { font-size: 1.12rem; color: var(--quiet); }
.note, figcaption, footer { color: var(--quiet); font-size: .9rem; }
a { color: var(--accent); }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: .8rem;
  margin: 1.6rem 0 0;
}
.tile {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: .9rem 1rem;
}
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; white-space: nowrap; }
.tile span { color: var(--quiet); font-size: .9rem; line-height: 1.4; display: block; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td {
  padding: .5rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: bottom;
}
td { white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; font-size: .86rem; line-height: 1.3; }
.word { text-align: left; }
td small { color: var(--quiet); }
sup { line-height: 0; }
figure { margin: 1.4rem 0; }
figure a { display: block; }
img {
  display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: 12px;
  background: #fcfcfa;
}
figcaption { margin-top: .5rem; }
figcaption code { color: var(--ink); margin-right: .4rem; }
@media (max-width: 600px) {
  body { font-size: 16px; }
  main { padding: 1.5rem 1rem 2rem; }
  table { font-size: .86rem; }
  th, td { padding: .4rem .35rem; }
  td.word { white-space: normal; }
}
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .6rem; }
"""
