"""A TFDS dataset of your own, from a folder of text files, prepared and read without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def local_text_builder(text_dir: str | Path, data_dir: str | Path) -> Any:
    """Prepare the ``*.txt`` of a folder as the TFDS dataset ``local_text``, in array_record.

    To make one of your own, copy the class below to a file and change three things: ``_info`` names
    the fields, ``_split_generators`` says which splits there are, and ``_generate_examples`` yields
    a unique key and the fields of each example. A dataset that is prepared is not prepared again:
    raise ``VERSION`` when its text changes. It is then a source like any other::

        local_text_builder("my/texts", "my/prepared")
        open_source("tfds:local_text@my/prepared")

    Args:
        text_dir: searched with its subfolders; one document per file.
        data_dir: where ``local_text/1.0.0`` is written.

    Returns:
        The builder; ``builder.as_data_source("train")`` has the examples.

    Raises:
        ValueError: there is no ``*.txt`` in `text_dir`.
    """
    import tensorflow_datasets as tfds
    from etils import epath

    files = sorted(Path(text_dir).expanduser().rglob("*.txt"))
    if not files:
        raise ValueError(f"no *.txt in the folder {text_dir}")

    # Registered, it could be opened by name from code; it is opened from its files. (And TFDS
    # refuses a second class of the name, which a second call would make.)
    class LocalText(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Text files of a folder."""

        VERSION = tfds.core.Version("1.0.0")
        name = "local_text"
        # Where it stands. Left to itself, TFDS 4.9.10 asks importlib_resources, which it does not
        # install, for any builder inside a package.
        code_path = epath.Path(__file__)

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, dict[str, str]]]:
            for file in files:
                key = file.relative_to(Path(text_dir).expanduser()).as_posix()
                yield key, {"text": file.read_bytes().decode()}

    builder = LocalText(data_dir=str(Path(data_dir).expanduser()), file_format="array_record")
    builder.download_and_prepare()
    return builder
