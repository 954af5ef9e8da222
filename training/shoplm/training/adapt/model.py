"""The base with a low-rank adapter (Hu et al., arXiv:2106.09685) and the heads that it is trained with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shoplm.model.shop_weights import mean_embeddings
from shoplm.training.adapt.replay import Replay
from shoplm.training.adapt.tensors import PassInputs, pass_inputs
from shoplm.training.ranker import OutputRows
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM


class AdaptedModel(nn.Module):
    """Frozen base, trained adapter, item rows and behaviour head. Hidden states are those after the final norm."""

    def __init__(
        self,
        folder: Path,
        texts: Sequence[Sequence[int]],
        rows: OutputRows,
        repeat_weight: float,
        horizons: int,
        rank: int,
    ) -> None:
        """`texts` are the words of each shop token, tokenised: their mean embeddings stand behind the text vocabulary.
        `rows` are where item logits start."""
        super().__init__()
        causal: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.peft: PeftModel = get_peft_model(causal, config, autocast_adapter_dtype=False)
        config.target_modules = sorted(config.target_modules or ())  # a set: its order would differ from run to run
        config.base_model_name_or_path = folder.name  # where the base lies on this machine is nobody's business
        embedding = causal.get_input_embeddings().weight.detach()
        self._table = torch.cat((embedding, mean_embeddings(embedding, texts)))
        self.rows = nn.Parameter(rows.rows.clone())
        self.bias = nn.Parameter(rows.bias.clone())
        self.repeat_weight = nn.Parameter(torch.tensor(repeat_weight))
        self.behaviour = nn.Linear(embedding.shape[1], max(horizons, 1))

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.peft.parameters() if parameter.requires_grad]

    def head_parameters(self) -> list[nn.Parameter]:
        return [self.rows, self.bias, self.repeat_weight, *self.behaviour.parameters()]

    def hidden(self, inputs: PassInputs, *, adapted: bool = True) -> Tensor:
        """[T, H] in bf16. Without `adapted`, what the base alone computes."""
        core: Any = self.peft.get_base_model().model
        with nullcontext() if adapted else self.peft.disable_adapter():
            states: Tensor = core(
                inputs_embeds=self._table[inputs.tokens][None],
                attention_mask=inputs.mask,
                position_ids=inputs.positions,
                use_cache=False,
            ).last_hidden_state
        return states[0]

    def answer_logits(self, prefix: Sequence[int], chat: Replay, *, adapted: bool) -> Tensor:
        """[N, text vocabulary], fp32: what gives each of the answer's N tokens, behind `prefix` and the prompt."""
        hidden = self.hidden(pass_inputs((*prefix, *chat.suffix, *chat.answer), ()), adapted=adapted)
        first = len(prefix) + len(chat.suffix) - 1  # the state that gives the answer's first token
        return self.text_logits(hidden[first : first + len(chat.answer)])

    def text_logits(self, hidden: Tensor) -> Tensor:
        """[N, text vocabulary], fp32."""
        head: Any = self.peft.get_base_model().lm_head
        logits: Tensor = functional.linear(hidden, head.weight).float()
        return logits

    def item_logits(self, hidden: Tensor) -> Tensor:
        """[N, items], fp32."""
        return torch.addmm(self.bias, hidden.float(), self.rows.T)

    def purchase_logits(self, hidden: Tensor) -> Tensor:
        """[N, horizons], fp32: of a purchase within each horizon."""
        scaled = functional.layer_norm(hidden.float(), hidden.shape[-1:])
        logits: Tensor = self.behaviour(scaled)
        return logits

    def save_adapter(self, folder: Path) -> None:
        """In PEFT's format."""
        self.peft.save_pretrained(str(folder))
