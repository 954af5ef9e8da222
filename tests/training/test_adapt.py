"""`shoplm adapt`: one pass equals its branches alone, a stopped run goes on, and the adapter is what is served."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from shoplm.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_manifest
from shoplm.catalog.items import Catalog
from shoplm.model.adapter import read_adapter
from shoplm.model.base import Base, resolve_base
from shoplm.model.origin import Origin
from shoplm.retrieval import DECLINED, Knowledge, Passage
from shoplm.training.adapt import chat_kept, trainer
from shoplm.training.adapt.conversations import FactWriter, talk_prompts
from shoplm.training.adapt.model import AdaptedModel
from shoplm.training.adapt.questions import about_sentence
from shoplm.training.adapt.replay import Replay
from shoplm.training.adapt.tensors import Branch, pass_inputs
from shoplm.training.cli import adapt, evaluate, train
from shoplm.training.ranker import OutputRows
from shoplm.training.report import Report
from torch.nn import functional
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("quick_heads")
Shell = Callable[..., str]
_KNOWLEDGE = Knowledge([Passage("a.md", "Returns", "You can return goods within 30 days. Bring the receipt.")])


@pytest.fixture(scope="module")
def shell(tiny_base: Base, tiny_files: Path) -> Shell:
    app = typer.Typer()
    for command in (adapt, train, evaluate):
        app.command()(command)

    def invoke(*arguments: object, code: int = 0) -> str:
        log = [tiny_files / name for name in ("events.parquet", "items.parquet", "customers.parquet")]
        files = ["--events", log[0], "--items", log[1], "--customers", log[2], "--base", tiny_base.folder]
        result = CliRunner().invoke(app, [*map(str, (*arguments, *files))])
        assert result.exit_code == code, result.output
        return result.output

    return invoke


@pytest.fixture(scope="module")
def bundle(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapt") / "shop"
    shell("train", "--out", out, *_quick())
    return out


def _quick() -> list[object]:
    return ["--history-tokens", 64, "--history-block", 32, "--epochs", 1, "--minutes", 0, "--explained", 0]


def _model(base: Base) -> AdaptedModel:
    hidden = base.config.hidden_size
    torch.manual_seed(0)
    rows = OutputRows(torch.zeros(4, hidden), torch.zeros(4))
    return AdaptedModel(base.folder, [[3], [4, 5], [6]], rows, 1.0, 2, rank=2)


def test_a_branch_sees_its_prefix_and_itself_alone(tiny_base: Base) -> None:
    model = _model(tiny_base).float()
    random = np.random.default_rng(3)
    prefix = tuple(random.integers(3, 400, 20).tolist())
    branches = [Branch(20, (7, 8)), Branch(5, (9, 10, 11)), Branch(0, (12,))]
    model.float()
    inputs = pass_inputs(prefix, branches)
    packed = model.hidden(inputs)
    for start, branch in zip(inputs.starts, branches, strict=True):
        alone = model.hidden(pass_inputs((*prefix[: branch.length], *branch.tokens), ()))
        torch.testing.assert_close(packed[start : start + len(branch.tokens)], alone[branch.length :])
    with pytest.raises(ValueError, match="a branch of length 21"):
        pass_inputs(prefix, [Branch(21, (1,))])


def test_an_untrained_adapter_changes_nothing(tiny_base: Base) -> None:
    model = _model(tiny_base)
    inputs = pass_inputs((3, 4, 5, 6), ())
    assert torch.equal(model.hidden(inputs), model.base_hidden(inputs))
    for name, parameter in model.peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.equal(model.hidden(inputs), model.base_hidden(inputs))


_CATALOG = Catalog(
    item_ids=["a", "b", "c"],
    titles=["Red tea, 20 bags", "Black tea, 20 bags", "Soap"],
    categories=["Drinks", "Drinks", "Bath"],
    prices=np.array([2.5, 3.25, np.nan]),
    in_stock=np.ones(3, bool),
    type_texts=[],
    rare={},
)


def test_facts_are_answered_by_a_passage_or_declined() -> None:
    random = np.random.default_rng(0)
    writer = FactWriter(_CATALOG, _KNOWLEDGE, "EUR")
    facts = [writer.draw(random) for _ in range(600)]
    declined = [fact for fact in facts if fact.answer == DECLINED]
    assert 0.1 < len(declined) / len(facts) < 0.5
    for fact in facts:
        if fact.answer == DECLINED:
            assert not any(passage.title.split(",")[0].lower() in fact.question.lower() for passage in fact.passages)
        elif "costs" in fact.answer:
            (title,) = [each for each in _CATALOG.titles if each in fact.answer]
            assert title.split(",")[0].lower() in fact.question.lower()
            price = f"{_CATALOG.prices[_CATALOG.titles.index(title)]:.2f}"
            assert any((passage.title, price) == (title, _price_of(passage)) for passage in fact.passages), fact
        else:
            assert any(_holds(passage, fact.answer) for passage in fact.passages), fact
    assert {fact.answer.split()[0] for fact in facts if "costs" in fact.answer} >= {"Yes.", "Red", "Black"}
    nothing_known = FactWriter(Catalog([], [], [], np.zeros(0), np.zeros(0, bool), [], {}), Knowledge([]), "EUR")
    assert {nothing_known.draw(random).answer for _ in range(20)} == {DECLINED}
    assert len(talk_prompts(_CATALOG, 9, random)) == 9


def test_what_the_shop_does_sell_is_not_declined_as_foreign() -> None:
    titles = ["Slim laptops", "Electric guitars"]
    catalog = Catalog(["a", "b"], titles, ["", ""], np.ones(2), np.ones(2, bool), [], {})
    writer = FactWriter(catalog, Knowledge([]), "EUR")
    random = np.random.default_rng(0)
    asked = [fact.question for fact in (writer.draw(random) for _ in range(600)) if fact.answer == DECLINED]
    foreign = [question for question in asked if "slim" not in question.lower() and "electric" not in question.lower()]
    assert any("piano" in question for question in foreign)
    assert not any(word in question for question in foreign for word in ("laptops", "guitars"))


_SENTENCES = (
    ("Delivery costs 4.95 dollars.", {"How much", "What does it cost", "What do I pay"}),
    ("We are open from 8 a.m. on Sunday.", {"When", "At what time", "Until when", "On which days"}),
    ("The parcel arrives after 5 working days.", {"How long", "How soon", "Within what time"}),
    ("Alcohol cannot be returned.", {"Can I", "Is it possible", "Am I allowed"}),
)


@pytest.mark.parametrize(("sentence", "beginnings"), _SENTENCES)
def test_a_sentence_is_asked_for_in_forms_of_what_it_says(sentence: str, beginnings: set[str]) -> None:
    random = np.random.default_rng(0)
    asked = [about_sentence(sentence, "Terms", random) for _ in range(300)]
    for beginning in beginnings:
        assert any(question.startswith(beginning) for question in asked), beginning
    assert not any(digit in question for question in asked for digit in "0123456789")  # which are the answer
    words = set(re.findall(r"[a-z'-]+", f"{sentence} Terms".lower()))
    assert all(words & set(re.findall(r"[a-z'-]+", question.lower())) for question in asked)


def _price_of(passage: Passage) -> str:
    return passage.text.split("price ")[-1].split()[0]


def _holds(passage: Passage, answer: str) -> bool:
    words = answer.removeprefix("You often buy ").split(" is in ")[-1].rstrip(".")
    return words in passage.text or passage.text.rstrip(".") in words


def test_a_stopped_run_ends_where_an_uninterrupted_one_does(
    shell: Shell, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("run", "chat_kept"):
        monkeypatch.setattr(f"shoplm.training.adapt.{module}.TALK_PROMPTS", 6)
    monkeypatch.setattr("shoplm.training.adapt.chat_kept.HELD_OUT_PROMPTS", 4)
    monkeypatch.setattr(trainer, "CHECKPOINT_STEPS", 2)
    shell("adapt", "--bundle", bundle, "--out", tmp_path / "whole", "--steps", 3, "--rank", 2)

    class StopError(Exception):
        pass

    def stop(self: trainer.JointTrainer) -> None:
        if self.step == 2:
            raise StopError
        update(self)

    update = trainer.JointTrainer._update
    with monkeypatch.context() as patch, pytest.raises(AssertionError):  # the command fails
        patch.setattr(trainer.JointTrainer, "_update", stop)
        shell("adapt", "--bundle", bundle, "--out", tmp_path / "parts", "--steps", 3, "--rank", 2)
    shell("adapt", "--bundle", bundle, "--out", tmp_path / "parts", "--steps", 3, "--rank", 2)
    whole, parts = (load_file(tmp_path / name / "adapter" / ADAPTER_WEIGHTS) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    assert any(bool(tensor.any()) for name, tensor in whole.items() if "lora_B" in name)
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}  # whatever it was trained in
    _trains_and_measures(shell, bundle, tmp_path)


def test_all_layers_are_trained_to_a_base_of_its_own(
    shell: Shell, bundle: Path, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("run", "chat_kept"):
        monkeypatch.setattr(f"shoplm.training.adapt.{module}.TALK_PROMPTS", 6)
    monkeypatch.setattr("shoplm.training.adapt.chat_kept.HELD_OUT_PROMPTS", 4)
    arguments = ["--out", tmp_path / "out", "--steps", 1, "--full", "--gradient-checkpointing"]
    assert "shoplm train --base" in " ".join(shell("adapt", "--bundle", bundle, *arguments).split())
    base = resolve_base(str(tmp_path / "out" / "base"))
    assert base.origin is Origin.ADAPTED and base.config == tiny_base.config
    assert base.fingerprint != tiny_base.fingerprint


def test_a_tuned_base_replaces_no_other_things(shell: Shell, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.txt").write_text("mine")
    said = shell("adapt", "--bundle", bundle, "--out", tmp_path, "--steps", 1, "--full", code=2)
    assert "no base that was trained like this" in " ".join(said.split())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["base", "mine.txt"]


def test_an_adapter_of_another_run_is_not_overwritten(shell: Shell, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    said = shell("adapt", "--bundle", bundle, "--out", tmp_path, "--steps", 1, code=2)
    assert "no checkpoint beside it" in " ".join(said.split())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["adapter", "adapter_config.json"]


def test_an_adapter_is_kept_at_the_strength_that_keeps_chat() -> None:
    class Shifted:
        """Talks like the base, but for what the adapter takes from the logit of the right token."""

        strength, harm = 1.0, 0.0

        def train(self, mode: bool) -> None: ...

        @contextmanager
        def at_strength(self, strength: float) -> Iterator[None]:
            self.strength = strength
            yield

        def answer_logits(self, prefix: tuple[int, ...], chat: Replay, *, adapted: bool) -> torch.Tensor:
            right = 1.0 - adapted * self.strength * self.harm
            return right * functional.one_hot(torch.tensor(chat.answer), 1000)

    model, replays = Shifted(), [Replay((1,), (2, 3)), Replay((1,), (4,))]
    builder = SimpleNamespace(prefix=lambda history: SimpleNamespace(tokens=(0,)))
    watch = SimpleNamespace(advance=lambda *args: None)
    found = {}
    for harm in (0.0, 0.04, 0.06, 5.0):  # in nats, all but: log 1.05 is .0488, which .06 is at .81
        model.harm = harm
        found[harm] = chat_kept.strength_that_keeps_chat(model, builder, replays, watch)  # type: ignore[arg-type]
    assert found == {0.0: 1.0, 0.04: 1.0, 0.06: 0.8, 5.0: 0.5}


def test_an_adapter_is_saved_at_its_strength(tiny_base: Base, tmp_path: Path) -> None:
    rows = OutputRows(torch.zeros(0, tiny_base.config.hidden_size), torch.zeros(0))
    model = AdaptedModel(tiny_base.folder, [], rows, 0.0, 0, rank=2)
    for parameter in model.trunk_parameters():
        parameter.data.fill_(0.1)
    model.save(tmp_path / "half", 0.5)
    model.save(tmp_path / "whole")
    hidden = tiny_base.config.hidden_size
    half, whole = (
        read_adapter(tmp_path / name).merge("model.layers.0.self_attn.q_proj.weight", torch.zeros(hidden, hidden))
        for name in ("half", "whole")
    )
    assert whole.any()
    assert torch.equal(half, whole / 2)


def _trains_and_measures(shell: Shell, bundle: Path, tmp_path: Path) -> None:
    """The adapter goes into the bundle, and `evaluate` reads the states of the adapted base."""
    out = tmp_path / "adapted"
    shell("train", "--out", out, "--adapter", tmp_path / "whole" / "adapter", *_quick())
    manifest, plain = read_manifest(out), read_manifest(bundle)
    config = json.loads((out / ADAPTER_CONFIG).read_text())
    assert "/" not in config["base_model_name_or_path"]
    assert manifest.has_adapter and manifest.prompt.chat_reads_item_tokens
    assert not plain.has_adapter and not plain.prompt.chat_reads_item_tokens
    assert manifest.version != plain.version
    shell("evaluate", "--bundle", out, "--explained", 0, "--json", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (out / "metrics.json").read_bytes()
    report = msgspec.json.decode((out / "metrics.json").read_bytes(), type=Report)
    assert report.chat is not None and report.chat.answers == 4 and report.chat.adapted != report.chat.base
    assert f"| adapted | {report.chat.adapted:.2f} |" in (out / "card.md").read_text()
