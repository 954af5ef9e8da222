"""The page: one HTML file that needs nothing else. Everything that comes from the shop is escaped."""

from __future__ import annotations

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from shoplm.charts import COLOURS
from shoplm.explain.collect import Attention, Explained
from shoplm.v1 import prediction_pb2

_CELL, _ROW = 16, 3  # pixels of a place, and of a head

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Customer {{ it.customer_id }}: why</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #d0d7de } h3 { margin: 1.5rem 0 .3rem }
.note { color: #57606a } .bar { display: inline-block; height: .7rem; vertical-align: baseline }
table { border-collapse: collapse; width: 100% } td { padding: .1rem .6rem .1rem 0; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; width: 5rem }
td.drawn { width: 220px; white-space: nowrap } .unread { color: #8c959f }
mark { background: #fff8c5; padding: 0 .2rem; border-radius: 3px }
.map { overflow-x: auto } svg text { font-size: 11px; fill: #57606a } .end { text-anchor: end }
</style>
<h1>Customer {{ it.customer_id }}, as of {{ it.as_of }}</h1>
<p class="note">{{ it.recommended.model.bundle }} {{ it.recommended.model.version }} on
{{ it.recommended.model.base_model }}. Effects say what moved a score, not what moved the customer: a part of the
history is left out, counts are made again, and the model does not read it. They need not add up.</p>

<h2>Recommendations</h2>
{% for item in it.recommended.items %}
<h3>{{ loop.index }}. {{ item.title }} <span class="note">{{ item.item_id }}, score
{{ "%.2f"|format(item.score) }}</span></h3>
<table>
{% for reason in item.reasons %}<tr><td class="number">{{ signed(reason.contribution) }}</td>
<td class="drawn">{{ bar(reason.contribution, scale) }}</td><td>{{ reason.text }}</td></tr>{% endfor %}
{% for influence in item.influences %}<tr><td class="number">{{ signed(influence.effect) }}</td>
<td class="drawn">{{ bar(influence.effect, scale) }}</td><td class="note">{{ influence.text }}
(the model's share {{ signed(influence.model_effect) }})</td></tr>{% endfor %}
</table>
{% endfor %}

<h2>Predictions</h2>
{% for prediction in it.predicted.predictions if prediction.applicable %}
<h3>{{ target(prediction.target) }}: {{ value(prediction) }}</h3>
<table>
{% for influence in prediction.influences %}<tr><td class="number">{{ signed(influence.effect) }}</td>
<td class="drawn">{{ bar(influence.effect, 2.0) }}</td><td class="note">{{ influence.text }}</td></tr>{% endfor %}
</table>
{% endfor %}

<h2>History</h2>
<p class="note">Newest first; <mark>marked</mark> is what an effect above names. Grey visits are too old for the model's
part; they still count.</p>
<table>
{% for basket in it.baskets|reverse %}<tr{% if not basket.is_read %} class="unread"{% endif %}>
<td class="number">{{ basket.day }}</td>
<td>{% for id, title in basket.items %}{% if id in cited %}<mark>{{ title }}</mark>{% else %}{{ title }}{% endif %}
{%- if not loop.last %}, {% endif %}{% endfor %}</td></tr>
{% endfor %}
</table>

<h2>Attention</h2>
<p class="note"><b>Attention, not cause.</b> Each row is a head, {{ heads }} to a layer, the first layer on top; each
column a visit, the oldest on the left. What comes before the history ({{ "%.0f"|format(100 * before) }} % of the mass)
and the task itself ({{ "%.0f"|format(100 * task) }} %) are left out. The darker, the more of the last token's attention
lies on the visit. Hover for numbers.</p>
<div class="map">{{ heat(it.attention) }}</div>
<h3>All layers and heads together</h3>
<table>
{% for place, mass in visits %}<tr><td class="number">{{ place }}</td>
<td class="number">{{ "%.2f"|format(100 * mass) }} %</td>
<td>{{ bar(mass, most) }}</td></tr>{% endfor %}
</table>
</html>
"""


def render(it: Explained) -> str:
    """The page as text."""
    mass = it.attention.mass.mean(axis=(0, 1))
    between = list(zip(it.attention.places[1:-1], mass[1:-1].tolist(), strict=True))
    influences = [each for item in it.recommended.items for each in item.influences]
    reasons = [reason.contribution for item in it.recommended.items for reason in item.reasons]
    page = Environment(autoescape=True).from_string(_PAGE)
    return page.render(
        it=it,
        bar=_bar,
        signed=_signed,
        heat=_heat,
        target=_target,
        value=_value,
        cited={each.item_id for each in influences if each.item_id},
        scale=max(map(abs, [*reasons, *(each.effect for each in influences)]), default=1.0),
        heads=it.attention.mass.shape[1],
        before=mass[0],
        task=mass[-1],
        visits=between[::-1],
        most=max((share for _, share in between), default=1.0),
    )


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # and not -0.00


def _bar(value: float, most: float) -> Markup:
    width = min(abs(value) / most, 1.0) * 200.0 if most > 0 else 0.0
    colour = COLOURS[0] if value >= 0 else COLOURS[1]
    return Markup('<span class="bar" style="width:{:.1f}px;background:{}"></span>').format(width, colour)


def _heat(attention: Attention) -> Markup:
    """Rows: heads, layer after layer. Columns: visits. Shades follow the square root: most shares are small."""
    mass = attention.mass[:, :, 1:-1]
    layers, heads, visits = mass.shape
    darkest = float(np.sqrt(mass.max())) or 1.0
    left, top = 70, 6
    width, height = left + visits * _CELL + 4, top + layers * heads * _ROW + 18
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    for layer in range(layers):
        y = top + layer * heads * _ROW
        if layer % 5 == 0:
            parts.append(f'<text class="end" x="{left - 6}" y="{y + 10}">layer {layer + 1}</text>')
        for head in range(heads):
            for visit in range(visits):
                share = float(mass[layer, head, visit])
                shade = np.sqrt(share) / darkest
                if shade < 0.02:
                    continue
                parts.append(
                    f'<rect x="{left + visit * _CELL}" y="{y + head * _ROW}" width="{_CELL - 1}" height="{_ROW}" '
                    f'fill="{COLOURS[0]}" fill-opacity="{shade:.2f}"><title>layer {layer + 1}, head {head + 1}, '
                    f"{attention.places[1 + visit]}: {share:.1%}</title></rect>"
                )
    parts.append(f'<text x="{left}" y="{height - 4}">{attention.places[1]}</text>')
    if visits > 1:
        parts.append(f'<text class="end" x="{width - 4}" y="{height - 4}">{attention.places[-2]}</text>')
    return Markup("".join([*parts, "</svg>"]))


def _target(target: prediction_pb2.Target) -> str:
    name = prediction_pb2.TargetKind.Name(target.kind).removeprefix("TARGET_KIND_").replace("_", " ").lower()
    detail = target.campaign_type or (f"within {target.horizon_days} days" if target.horizon_days else "")
    return f"{name} {detail}".strip()


def _value(prediction: prediction_pb2.Prediction) -> str:
    if prediction.WhichOneof("value") == "probability":
        return f"{prediction.probability:.1%}"
    return f"{prediction.amount:.2f}"
