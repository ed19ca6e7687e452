"""Where a corpus is: files on this machine, or a dataset on the Hugging Face hub."""

from __future__ import annotations

import os
from dataclasses import dataclass

from jreg_megatron.data import sources
from jreg_megatron.data.sources import Source
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.extras import need


@dataclass(frozen=True)
class Corpus:
    """Inputs to look for.

    Attributes:
        inputs: files, folders and patterns.
        kind: their format, or None to go by the endings.
        hub: a dataset's name instead, or a folder that is laid out like one.
        subset: its configuration, or None if it has only one.
        split: its split.
    """

    inputs: tuple[str, ...] = ()
    kind: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"

    def find(self) -> list[Source]:
        """The files, in order.

        Raises:
            UserError: if there are none, or they are not of a kind that is read here.
        """
        if self.hub is None:
            return sources.find_sources(self.inputs, self.kind)
        if self.inputs:
            raise UserError(f"--hub {self.hub} and {self.inputs[0]} exclude each other; give one of them")
        return [sources.hub_source(url) for url in self._urls(self.hub)]

    def _urls(self, name: str) -> list[str]:
        """The files of the split as the hub's own library finds them; it runs no code of the dataset.

        They are read where they are, range by range, so nothing has to fit the disk but the tokens.
        """
        datasets = need("datasets", "--hub", "data")
        datasets.logging.set_verbosity_error()
        log = need("huggingface_hub.utils.logging", "--hub", "data")
        log.set_verbosity_error()  # it tells of every attempt
        where = f"--hub {name}" + (f" --subset {self.subset}" if self.subset else "")
        try:
            builder = datasets.load_dataset_builder(name, self.subset)
            files = builder.config.data_files
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            said = (" ".join(str(error).split()) or type(error).__name__)[:300]
            raise UserError(
                f"{where} cannot be found ({said}); correct the name or the network access"
            ) from error
        if not files or self.split not in files:
            known = f"only {', '.join(map(str, files))}" if files else "none"
            raise UserError(f"{where} has no split {self.split}, {known}; name one with --hub-split")
        return [os.fspath(file) for file in files[self.split]]
