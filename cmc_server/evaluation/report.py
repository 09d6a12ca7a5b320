"""One self-contained HTML page that a person can read: words, tables, plots and sample answers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2


@dataclass(frozen=True)
class Table:
    """A table of finished texts.

    Args:
        columns: headings.
        rows: one text per column.
        caption: what it shows.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Sample:
    """One prompt with its answers.

    Args:
        prompt: what was asked.
        answers: label, such as a strength, and text.
    """

    prompt: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """One suite in the report.

    Args:
        title: its heading.
        headline: the result in one or two sentences.
        words: what the numbers mean.
        tables: the numbers.
        plot: PNG file to embed; None for none.
        samples: answers to look at.
    """

    title: str
    headline: str
    words: str
    tables: Sequence[Table] = ()
    plot: Path | None = None
    samples: Sequence[Sample] = field(default=())


def render_report(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page. Nothing in it refers to another file or address.

    Args:
        title: its heading.
        facts: what was evaluated and how, as label and text.
        sections: in their order.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["picture"] = _data_uri
    return environment.from_string(_PAGE).render(title=title, facts=facts, sections=sections)


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #555; padding-bottom: .3rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e2e2e2; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { background: #f4f4f4; }
img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; font-size: .92rem; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
.headline { font-weight: 600; }
.samples dl { grid-template-columns: 4rem 1fr; margin: .2rem 0 1rem; }
.prompt { font-weight: 600; margin: 1rem 0 0; white-space: pre-line; }
ul.summary li { margin: .3rem 0; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<ul class="summary">
{% for section in sections %}
<li><a href="#s{{ loop.index }}">{{ section.title }}</a>: {{ section.headline }}</li>
{% endfor %}
</ul>
<dl>
{% for label, text in facts %}
<dt>{{ label }}</dt><dd>{{ text }}</dd>
{% endfor %}
</dl>
<p>Figures are means with 95&nbsp;% bootstrap intervals in brackets; strength 0 is the LLM without the delta under
study. An interval covers what other questions of the same kind might have given, not another training run.</p>
{% for section in sections %}
<section id="s{{ loop.index }}">
<h2>{{ section.title }}</h2>
<p class="headline">{{ section.headline }}</p>
<p>{{ section.words }}</p>
{% for table in section.tables %}
<div class="scroll"><table>
{% if table.caption %}
<caption>{{ table.caption }}</caption>
{% endif %}
<thead><tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
{% if section.plot %}
<p><img alt="{{ section.title }}: plot" src="{{ section.plot | picture }}"></p>
{% endif %}
{% if section.samples %}
<h3>Sample answers</h3>
<div class="samples">
{% for sample in section.samples %}
<p class="prompt">{{ sample.prompt }}</p>
<dl>
{% for label, text in sample.answers %}
<dt>{{ label }}</dt><dd>{{ text or "(nothing)" }}</dd>
{% endfor %}
</dl>
{% endfor %}
</div>
{% endif %}
</section>
{% endfor %}
</body>
</html>
"""
