"""report.html: the numbers of the card as pictures, in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment
from markupsafe import Markup
from shoplm.charts import STYLE, Line, bar_chart, line_chart
from shoplm.training.card_tables import estimate, ranking_rows
from shoplm.training.report import Breakdown, ProbabilityRow, Report, shown
from shoplm.training.watch import LOSS, NDCG, Watch

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}: training report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .7rem; border-bottom: 1px solid #d0d7de }
td + td, th + th { text-align: right } .charts { display: flex; flex-wrap: wrap; gap: 1.5rem }
{{ style }}
</style>
<h1>{{ title }}</h1>
<p>Measured on {{ "{:,}".format(report.customers) }} of {{ "{:,}".format(report.customers_in_log) }} customers, on what
they did after the training data end. The card, <code>card.md</code>, says how.</p>
{% if curves %}<h2>Learning</h2><div class="charts">{% for name, curve in curves %}
<div><h3>{{ name }}</h3>{{ curve }}</div>{% endfor %}</div>{% endif %}
{% for result in report.rankings %}
<h2>Recommendations: {{ result.split }} ({{ "{:,}".format(result.customers) }} customers)</h2>
<table><tr><th>ranking</th><th>recall@10</th><th>NDCG@10</th><th>repeat</th><th>explore</th></tr>
{% for row in ranking_rows(result) %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
<p>NDCG@10 is {{ result.ndcg_over_count.verdict }} counting, and {{ result.ndcg_over_tifu.verdict }} TIFU-KNN.</p>
<div class="charts">
<div><h3>Recall by length of history</h3>{{ breakdown(result.by_visits, "visits known", "recall@10") }}</div>
<div><h3>Item popularity</h3>{{ breakdown(result.by_popularity, "items, most often bought first", "share") }}</div>
</div>
{% endfor %}
{% if report.probabilities %}
<h2>Probabilities</h2>
<table><tr><th>target</th><th>AUC</th><th>boosting</th><th>Brier</th><th>boosting</th><th>slope</th><th>intercept</th></tr>
{% for row in report.probabilities %}<tr><td>{{ row.target }}</td><td>{{ shown(row.auc, ".3f") }}</td>
<td>{{ shown(row.boosted_auc, ".3f") }}</td><td>{{ shown(row.brier, ".4f") }}</td>
<td>{{ shown(row.boosted_brier, ".4f") }}</td><td>{{ estimate(row.slope, ".2f") }}</td>
<td>{{ estimate(row.intercept, "+.2f") }}</td></tr>{% endfor %}</table>
<div class="charts">{% for row in report.probabilities %}
<div><h3>{{ row.target }}</h3>{{ reliability(row) }}</div>{% endfor %}</div>
{% endif %}
{% if report.amounts %}
<h2>Amounts</h2>
<table><tr><th>target</th><th>by</th><th>MAE</th><th>RMSE</th></tr>
{% for row in report.amounts %}{% for error in row.errors %}<tr><td>{{ row.target }}</td><td>{{ error.name }}</td>
<td>{{ shown(error.mae, ".2f") }}</td><td>{{ shown(error.rmse, ".2f") }}</td></tr>{% endfor %}{% endfor %}</table>
{% for row in report.amounts %}<p>{{ row.target }}: the 90 % intervals cover {{ shown(row.coverage, ".1%") }}.</p>
{% endfor %}
{% endif %}
</html>
"""


def render_report(title: str, report: Report, watch: Watch) -> str:
    """The page, with the learning curves that `watch` kept; everything that comes from the shop is escaped."""
    page = Environment(autoescape=True).from_string(_PAGE)
    return page.render(
        title=title,
        style=Markup(STYLE),
        report=report,
        shown=shown,
        estimate=estimate,
        ranking_rows=ranking_rows,
        breakdown=_breakdown,
        reliability=_reliability,
        curves=_curves(watch),
    )


def _curves(watch: Watch) -> list[tuple[str, Markup]]:
    """Loss and validation NDCG over the steps of each stage that has them."""
    found = []
    for stage in dict.fromkeys(point.stage for point in watch.points):
        for name in (LOSS, NDCG):
            points = watch.curve(stage, name)
            if len(points) > 1:
                steps, values = zip(*points, strict=True)
                bounds = (0.0, max(steps), min(values), max(values))
                line = Line(f"{name}, validation" if name == NDCG else name, points, marks=name == NDCG)
                found.append((f"{stage}: {line.name}", Markup(line_chart([line], "step", name, bounds))))
    return found


def _breakdown(groups: Sequence[Breakdown], x_title: str, y_title: str) -> Markup:
    if not groups:
        return Markup("<p>Nothing to show.</p>")
    series = {name: [each.values[name] for each in groups] for name in groups[0].values}
    return Markup(bar_chart([each.group for each in groups], series, x_title, y_title))  # escaped by the chart


def _reliability(row: ProbabilityRow) -> Markup:
    found = Line("said and happened", [(said, happened) for _, said, happened in row.reliability], marks=True)
    ideal = Line("if they were the same", [(0.0, 0.0), (1.0, 1.0)], dashed=True)
    return Markup(line_chart([found, ideal], "probability said", "share that did", (0.0, 1.0, 0.0, 1.0)))
