"""Models that are trained on baskets, behaviour and chat together: a trunk, item rows and a behaviour head.

`AdaptedModel` trains a low-rank adapter (Hu et al., arXiv:2106.09685) of a frozen base, `TunedModel` all of its layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from shoplm.model.origin import Origin
from shoplm.model.shop_weights import mean_embeddings
from shoplm.training.adapt.causal import CPU, load_causal
from shoplm.training.adapt.replay import Replay
from shoplm.training.adapt.saved_base import saved_base
from shoplm.training.adapt.tensors import PassInputs, pass_inputs
from shoplm.training.ranker import OutputRows
from torch import Tensor, nn
from torch.nn import functional


class JointModel(nn.Module):
    """A trunk with item rows and a behaviour head. Hidden states are those after the final norm."""

    rows: Tensor  # [items, H] fp32: output rows
    saved_as: str  # the folder that `save` is given

    def __init__(self, trunk: Any, table: Tensor, bias: Tensor, repeat_weight: float, horizons: int) -> None:
        """`trunk` is a decoder without its LM head; `table` [vocabulary, H], on the same device, are the input rows of
        text and shop tokens; `bias` [items] is where item logits start."""
        super().__init__()
        self._trunk = [trunk]  # in a list: what of it is trained, a subclass says
        self._table = [table]
        self.bias = nn.Parameter(bias.to(table.device, copy=True))
        self.repeat_weight = nn.Parameter(torch.tensor(repeat_weight, device=table.device))
        self.behaviour = nn.Linear(table.shape[1], max(horizons, 1)).to(table.device)

    @property
    def device(self) -> torch.device:
        """The device of the model's tensors and of what it returns."""
        return self._table[0].device

    def trunk_parameters(self) -> list[nn.Parameter]:
        """What is trained at the adapter's rate."""
        raise NotImplementedError

    def head_parameters(self) -> list[nn.Parameter]:
        return [self.bias, self.repeat_weight, *self.behaviour.parameters()]

    def hidden(self, inputs: PassInputs) -> Tensor:
        """[T, H] in the trunk's dtype. `inputs` may lie on the host."""
        return self._states(self._trunk[0], inputs)

    def _states(self, trunk: Any, inputs: PassInputs) -> Tensor:
        states: Tensor = trunk(
            inputs_embeds=functional.embedding(inputs.tokens.to(self.device), self._table[0])[None],
            attention_mask=inputs.mask.to(self.device),
            position_ids=inputs.positions.to(self.device),
            use_cache=False,
        ).last_hidden_state
        return states[0]

    def item_logits(self, hidden: Tensor) -> Tensor:
        """[N, items], fp32."""
        return torch.addmm(self.bias, hidden.float(), self.rows.T)

    def purchase_logits(self, hidden: Tensor) -> Tensor:
        """[N, horizons], fp32: of a purchase within each horizon."""
        scaled = functional.layer_norm(hidden.float(), hidden.shape[-1:])
        logits: Tensor = self.behaviour(scaled)
        return logits

    def save(self, folder: Path) -> None:
        """Write the trunk's change, or the trunk, to `folder`, in the form that is served."""
        raise NotImplementedError


class TalkingModel(JointModel):
    """A model that chats: it has a text head, and its base can be asked for what it would have said."""

    def __init__(
        self,
        causal: Any,
        texts: Sequence[Sequence[int]],
        rows: OutputRows,
        repeat_weight: float,
        horizons: int,
    ) -> None:
        """`texts` are the words of each shop token, tokenised: their mean embeddings stand behind the text vocabulary,
        and are not trained."""
        embedding = causal.get_input_embeddings().weight.detach()
        table = torch.cat((embedding, mean_embeddings(embedding, texts)))
        super().__init__(causal.model, table, rows.bias, repeat_weight, horizons)
        self.rows = nn.Parameter(rows.rows.to(table.device, copy=True))
        self._text_head = causal.get_output_embeddings().weight.detach()

    def head_parameters(self) -> list[nn.Parameter]:
        assert isinstance(self.rows, nn.Parameter)
        return [self.rows, *super().head_parameters()]

    def base_hidden(self, inputs: PassInputs) -> Tensor:
        """[T, H]: what the base computes."""
        raise NotImplementedError

    def answer_logits(self, prefix: Sequence[int], chat: Replay, *, adapted: bool) -> Tensor:
        """[N, text vocabulary], fp32: what gives each of the answer's N tokens, behind `prefix` and the prompt."""
        inputs = pass_inputs((*prefix, *chat.suffix, *chat.answer), ())
        hidden = self.hidden(inputs) if adapted else self.base_hidden(inputs)
        first = len(prefix) + len(chat.suffix) - 1  # the state that gives the answer's first token
        return self.text_logits(hidden[first : first + len(chat.answer)])

    def text_logits(self, hidden: Tensor) -> Tensor:
        """[N, text vocabulary], fp32."""
        return functional.linear(hidden, self._text_head).float()


class AdaptedModel(TalkingModel):
    """Frozen base and a low-rank adapter."""

    saved_as = "adapter"

    def __init__(
        self,
        folder: Path,
        texts: Sequence[Sequence[int]],
        rows: OutputRows,
        repeat_weight: float,
        horizons: int,
        rank: int,
        *,
        checkpointing: bool = False,
        adapter: Path | None = None,
        device: torch.device = CPU,
    ) -> None:
        """`adapter`, in PEFT's format and of any rank, is used and not trained; without one, a new adapter is made."""
        causal = load_causal(folder, device, checkpointing=checkpointing)
        super().__init__(causal, texts, rows, repeat_weight, horizons)
        if adapter is not None:
            self.peft: PeftModel = PeftModel.from_pretrained(causal, str(adapter), autocast_adapter_dtype=False)
            return
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.peft = get_peft_model(causal, config, autocast_adapter_dtype=False)
        config.target_modules = sorted(config.target_modules or ())  # a set: its order would differ from run to run
        config.base_model_name_or_path = folder.name  # where the base lies on this machine is nobody's business

    def trunk_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.peft.parameters() if parameter.requires_grad]

    def base_hidden(self, inputs: PassInputs) -> Tensor:
        with self._without_adapter():
            return self.hidden(inputs)

    def _without_adapter(self) -> AbstractContextManager[None]:
        disabled: AbstractContextManager[None] = self.peft.disable_adapter()
        return disabled

    def at_strength(self, strength: float) -> AbstractContextManager[None]:
        """The adapter times `strength`: between base and adapter (WiSE-FT, arXiv:2109.01903)."""
        scaled: AbstractContextManager[None] = rescale_adapter_scale(self.peft, strength)
        return scaled

    def save(self, folder: Path, strength: float = 1.0) -> None:
        """Save the adapter times `strength`, in PEFT's format and bf16."""
        config = self.peft.active_peft_config
        trained = config.lora_alpha
        config.lora_alpha = trained * strength
        try:
            in_bf16 = {name: value.to(torch.bfloat16) for name, value in self.peft.state_dict().items()}
            self.peft.save_pretrained(str(folder), state_dict=in_bf16)
        finally:
            config.lora_alpha = trained


class TunedModel(TalkingModel):
    """All layers of the base are trained; its embedding and LM head are not, so that the words keep their rows."""

    saved_as, origin = "base", Origin.ADAPTED

    def __init__(
        self,
        folder: Path,
        texts: Sequence[Sequence[int]],
        rows: OutputRows,
        repeat_weight: float,
        horizons: int,
        *,
        checkpointing: bool = False,
        device: torch.device = CPU,
    ) -> None:
        causal = load_causal(folder, device, checkpointing=checkpointing)
        causal.requires_grad_(False)
        super().__init__(causal, texts, rows, repeat_weight, horizons)
        self._folder, self._causal = folder, [causal]
        self._teacher = [load_causal(folder, device, checkpointing=False).model.requires_grad_(False).train(False)]
        self.layers, self.norm = causal.model.layers, causal.model.norm
        for parameter in self.trunk_parameters():
            parameter.requires_grad_(True)

    def trunk_parameters(self) -> list[nn.Parameter]:
        return [*self.layers.parameters(), *self.norm.parameters()]

    def base_hidden(self, inputs: PassInputs) -> Tensor:
        return self._states(self._teacher[0], inputs)

    def save(self, folder: Path) -> None:
        """A base of its own, with the tokenizer of the old one."""
        with saved_base(folder, self.origin) as partial:
            self._causal[0].save_pretrained(str(partial))
            for path in sorted(self._folder.iterdir()):
                if path.suffix in (".json", ".jinja") and not (partial / path.name).exists():
                    shutil.copyfile(path, partial / path.name)
