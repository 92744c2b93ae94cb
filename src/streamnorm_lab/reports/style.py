"""The look of the report: one column, readable on a phone, light or dark as the reader's system is."""

CSS = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #e2e2e2; --paper: #fcfcfa; --card: #fff;
        --good: #00704f; --bad: #a8430a; --note: #fff6dd; --link: #00588f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e3; --soft: #a5a5a0; --line: #3a3a38; --paper: #191918; --card: #222220;
          --good: #4fd1a5; --bad: #f0935a; --note: #3a3320; --link: #7cc4f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
       font: 1.03rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; }
p, ul, ol { max-width: 46rem; }
.lead { color: var(--soft); margin: 0 0 1.4rem; }
.question { font-size: 1.12rem; }
.verdict { background: var(--card); border: 1px solid var(--line); border-left: 4px solid #009e73; border-radius: 6px;
           padding: .9rem 1.2rem; margin: 1.4rem 0; }
.verdict h2 { margin: 0 0 .4rem; }
.verdict ul { margin: 0; padding-left: 1.1rem; }
.verdict li { margin: .4rem 0; }
.warning { background: var(--note); border-radius: 6px; padding: .6rem 1rem; margin: .8rem 0; max-width: 46rem; }
figure { margin: 1.4rem 0; }
figure .sheet { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto; }
figure img { display: block; width: 100%; height: auto; }
figure.wide img { min-width: 46rem; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .5rem; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .96rem; }
th, td { padding: .45rem .9rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; text-align: left; }
thead th { font-weight: 600; border-bottom: 2px solid var(--line); }
td.text { min-width: 15rem; max-width: 24rem; } td details { margin: .2rem 0; font-size: .9rem; }
td.number, th.number { text-align: right; white-space: nowrap; padding: .45rem .6rem; }
tbody th { font-weight: 600; white-space: nowrap; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
small { color: var(--soft); }
.ahead { color: var(--good); } .behind { color: var(--bad); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
      font-size: .9rem; overflow-x: auto; }
details { margin: .8rem 0; } summary { cursor: pointer; font-weight: 600; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; } details pre { white-space: pre-wrap; overflow-wrap: anywhere; }
a { color: var(--link); }
"""
