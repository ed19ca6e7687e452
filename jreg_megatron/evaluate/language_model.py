"""A decoder as a model for lm-evaluation-harness. The import of this module takes seconds."""

from __future__ import annotations

from itertools import batched
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_LENGTH
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from jreg_megatron.decoder.decoder import Decoder, refuse_dependence
from jreg_megatron.evaluate.layers import score_own
from jreg_megatron.runtime.errors import UserError

Request = tuple[Any, list[int], list[int]]
"""A name (not used), the ids of the context, and the ids to score."""


class DecoderLM(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods from a :class:`Decoder`.

    Of a text that is too long, the model sees the end, as in the harness's own models.
    """

    def __init__(self, decoder: Decoder, batch_size: int, quiet: bool) -> None:
        """Raises :class:`UserError` for a model without a tokenizer."""
        super().__init__()
        if decoder.encode is None:
            raise UserError(
                f"{decoder.name} has no tokenizer, which tasks need; leave tasks out with --parts"
            )
        self._decoder, self._batch_size, self._quiet = decoder, batch_size, quiet
        self._tried = False
        self._encode = decoder.encode
        self._begin = self._encode("")
        self._max_length = decoder.max_length or DEFAULT_MAX_LENGTH

    @property
    def eot_token_id(self) -> int:
        """The token before a text: the beginning-of-text token, else the end-of-text token."""
        if self._begin:
            return self._begin[-1]
        if self._decoder.end_of_text is None:
            raise UserError(f"the tokenizer of {self._decoder.name} has no token that begins or ends a text")
        return self._decoder.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, without leading special tokens if ``add_special_tokens`` is False."""
        ids = self._encode(string)
        return ids[len(self._begin) :] if add_special_tokens is False else ids

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each text, in pieces of the model's length."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append((None, *utils.make_disjoint_window(pair)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (loglikelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += loglikelihood
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Not supported; :func:`load_tasks` refuses such tasks."""
        raise NotImplementedError("text is not generated")

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, **more: Any
    ) -> list[tuple[float, bool]]:
        for _, _, wanted in requests:
            if not 0 < len(wanted) <= self._max_length:
                raise UserError(
                    f"a task has a continuation of {len(wanted)} tokens, and {self._decoder.name} takes 1 to "
                    f"{self._max_length}; leave the task out"
                )
        # Longest first: a lack of memory shows at once, and the rows of a batch have similar lengths.
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        if order and not self._tried:
            _, context, wanted = requests[order[0]]
            refuse_dependence(self._decoder, (context + wanted)[-self._max_length :], self._batch_size)
            self._tried = True
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        about = {"desc": f"{self._decoder.name}: tasks", "unit": " requests", "leave": False}
        with tqdm(total=len(requests), disable=self._quiet or None, **about) as bar:
            for batch in batched(order, self._batch_size):
                for number, answer in zip(batch, self._answers([requests[n] for n in batch]), strict=True):
                    answers[number] = answer
                bar.update(len(batch))
        return answers

    @torch.inference_mode()
    def _answers(self, requests: list[Request]) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's ids to score, and whether all of them are the most likely ids."""
        kept = [torch.tensor((context + ids)[-(self._max_length + 1) :]) for _, context, ids in requests]
        lengths = [len(wanted) for _, _, wanted in requests]
        # Padded on the right, where padding does not affect a causal model.
        inputs = pad_sequence([ids[:-1] for ids in kept], batch_first=True).to(self._decoder.device)
        rows = torch.arange(len(kept)).repeat_interleave(torch.tensor(lengths))
        ends = list(zip(kept, lengths, strict=True))
        columns = torch.cat([torch.arange(len(ids) - 1)[-length:] for ids, length in ends])
        targets = torch.cat([ids[-length:] for ids, length in ends]).to(self._decoder.device)
        loss, top = score_own(self._decoder, inputs, (rows, columns), targets)
        parts = zip(torch.split(loss.double(), lengths), torch.split(top == targets, lengths), strict=True)
        return [(-float(losses.sum()), bool(hits.all())) for losses, hits in parts]
