"""The page's style sheet: light, dark and print."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --grid: #e1e4e8; --page: #ffffff; --box: #f6f8fa;
  --bad: #b3261e; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa4af; --grid: #343a42;
  --page: #15181c; --box: #1f242a; --bad: #ff8a80; } }
body { margin: 0 auto; max-width: 1120px; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; padding-bottom: .2rem; font-size: 1.25rem; border-bottom: 1px solid var(--grid); }
h3 { margin: 0 0 .4rem; font-size: 1.05rem; }
p, li, figcaption { max-width: 82ch; }
figcaption, .soft { color: var(--soft); font-size: .92rem; }
.warning { color: var(--bad); font-weight: 600; }
.key { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .6rem; margin: 1.2rem 0; }
.key div { padding: .6rem .7rem; background: var(--box); border-radius: 6px; }
.key dt { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
.key dd { margin: 0; font-size: 1.25rem; font-weight: 600; overflow-wrap: anywhere; }
figure { margin: 1.8rem 0; break-inside: avoid; }
svg { display: block; max-width: 100%; height: auto; margin: .6rem 0 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0 1rem; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem; text-align: right; border-bottom: 1px solid var(--grid); }
thead th { color: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 500; white-space: nowrap; }
th:first-child, .text th, .text td { text-align: left; }
.text td { overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } .wide { overflow: visible; }
  .key div { border: 1px solid var(--grid); } table { font-size: 8pt; } th, td { padding: .15rem .4rem; }
  tr { break-inside: avoid; } h2, h3, .soft { break-after: avoid; } }
"""
