"""Runs to Hugging Face folders and back: the same model, the same tokens, and runs like others."""

import dataclasses
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compress.export.native import load_native
from experiments import convert, evaluate, export, generate, pretrain
from experiments.convert import from_huggingface, to_huggingface
from experiments.export import Export, run_command
from experiments.json_files import write_json
from experiments.runs.run import open_run
from model import huggingface
from model.presets import gpt2_tiny, llama_tiny, modern_tiny
from model.transformer import Transformer
from tests.compiled import logits_of
from tests.huggingface_cases import assert_same, drawn
from train.checkpoints import Checkpoints
from train.settings import Phase, Settings, to_json
from train.step import init_state
from train.tokenizers.bpe import byte_alphabet
from train.tokenizers.tokenizer import load_tokenizer, train_sentencepiece

TEXT = "it was the best of times; hé ☃\n\n    it was (the) <worst> of times,  age 17.\t"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERANDO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    pieces = [*byte_alphabet(), "th", "the", "Ġthe", "<|endoftext|>"]
    write_json(folder / "vocab.json", {piece: i for i, piece in enumerate(pieces)})
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n")
    return {
        "bytes": load_tokenizer("bytes"),
        "gpt2": load_tokenizer(f"gpt2:{folder}"),
        "sentencepiece": train_sentencepiece([TEXT] * 9, 310),
    }


def make_run(folder, config, tokenizer, steps=(5,)):
    """A run with redrawn parameters, as `runs.execute` would leave it, without training."""
    folder.mkdir()
    tokenizer.save(folder / "tokenizer")
    config = type(config)(**{**vars(config), "vocabulary_size": tokenizer.vocabulary_size})
    settings = Settings(phases=(Phase(max(steps), config, 4, 16),), data=("stdlib",))
    write_json(folder / "settings.json", to_json(settings))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for step in steps:
            state = init_state(jax.random.key(0), drawn(config, step, 0.1), optax.sgd(0.1))
            checkpoints.save(step, state, {"phase": 0})
    return folder


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main()


@pytest.mark.variants(2)
@pytest.mark.parametrize("kind", ["bytes", "gpt2", "sentencepiece"])
@pytest.mark.parametrize("config", [gpt2_tiny(), llama_tiny()], ids=["gpt2", "llama"])
def test_there_and_back_is_bitwise(tmp_path, tokenizers, config, kind):
    run = open_run(make_run(tmp_path / "run", config, tokenizers[kind]))
    lines = to_huggingface(tmp_path / "run", tmp_path / "hf")
    assert lines[0].endswith("at step 5")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]
    from_huggingface(tmp_path / "hf", tmp_path / "again")
    again = open_run(tmp_path / "again")
    assert again.step == 0
    assert again.model.config == run.model.config
    assert_same(again.params, run.params)
    assert again.tokenizer.encode(TEXT).tolist() == run.tokenizer.encode(TEXT).tolist()
    assert again.tokenizer.decode(run.tokenizer.encode(TEXT)) == TEXT
    assert again.tokenizer.end_of_document == run.tokenizer.end_of_document
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "hf", "run"]


def test_the_checkpoint_that_was_asked_for(tmp_path, tokenizers):
    make_run(tmp_path / "run", gpt2_tiny(), tokenizers["bytes"], steps=(3, 5))
    to_huggingface(tmp_path / "run", tmp_path / "hf", step=3)
    _, params = huggingface.load(tmp_path / "hf")
    assert_same(params, open_run(tmp_path / "run", 3).params)
    to_huggingface(tmp_path / "run", tmp_path / "narrow", dtype="bfloat16")
    from_huggingface(tmp_path / "narrow", tmp_path / "again", dtype="bfloat16")
    assert open_run(tmp_path / "again").params["final_norm"]["scale"].dtype == (jnp.bfloat16)


@pytest.mark.slow
def test_a_converted_run_opens_like_any_other(tmp_path, tokenizers, monkeypatch, capsys):
    """Through the command lines: convert twice, generate, evaluate, train on from it."""
    make_run(tmp_path / "run", gpt2_tiny(), tokenizers["bytes"])
    hf, again, child = tmp_path / "hf", tmp_path / "again", tmp_path / "child"
    call(convert, monkeypatch, "--run", tmp_path / "run", "--out", hf)
    call(convert, monkeypatch, "--hf", hf, "--out", again, "--tokenizer", "bytes")
    printed = capsys.readouterr().out
    assert f"folder       {hf}\n" in printed
    assert f"run          {again} at step 0" in printed

    call(generate, monkeypatch, "--run", again, "--prompt", "it was", "--max-new-tokens", "4")
    assert capsys.readouterr().out.startswith("it was")

    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    call(evaluate, monkeypatch, "--run", again, "--data", text, "--protocol", "windows:16")
    assert "windows:16" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no running text of its own; give --data"):
        call(evaluate, monkeypatch, "--run", again)

    arguments = f"--steps 2 --batch-size 2 --sequence-length 16 --data {text} --out {child}"
    rate = "--optimizer adam --learning-rate 1e-12"  # a step that moves nothing visibly
    code = call(pretrain, monkeypatch, "--from", again, *arguments.split(), *rate.split())
    assert code == 0
    ours, theirs = (open_run(folder).params for folder in (child, tmp_path / "run"))
    np.testing.assert_allclose(
        ours["blocks"]["mlp"]["up"]["kernel"], theirs["blocks"]["mlp"]["up"]["kernel"], atol=1e-9
    )


def test_padded_vocabularies_are_cut_to_the_tokenizer(tmp_path, tokenizers):
    """Logits of the pieces stay what they were; ids that no text has are gone."""
    config = llama_tiny(vocabulary_size=320)
    params = drawn(config)
    huggingface.save(tmp_path / "hf", config, params)
    lines = from_huggingface(tmp_path / "hf", tmp_path / "run", tokenizer="bytes")
    assert any("without 63 rows" in line for line in lines)
    run = open_run(tmp_path / "run")
    tokens = jnp.arange(20)[None]
    ours = logits_of(run.model, run.params, tokens)
    whole = logits_of(Transformer(config), params, tokens)
    np.testing.assert_allclose(ours, whole[..., :257], atol=1e-5)

    huggingface.save(
        tmp_path / "large",
        llama_tiny(vocabulary_size=1024),
        drawn(llama_tiny(vocabulary_size=1024)),
    )
    with pytest.raises(ValueError, match=r"has 1024 ids and the tokenizer has 257"):
        from_huggingface(tmp_path / "large", tmp_path / "no", tokenizer="bytes")
    huggingface.save(tmp_path / "small", llama_tiny(), drawn(llama_tiny()))
    with pytest.raises(ValueError, match=r"has 64 ids and the tokenizer has 257"):
        from_huggingface(tmp_path / "small", tmp_path / "no", tokenizer="bytes")
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(tmp_path, tokenizers, monkeypatch):
    make_run(tmp_path / "modern", modern_tiny(), tokenizers["bytes"])
    make_run(tmp_path / "run", gpt2_tiny(), tokenizers["bytes"])
    with pytest.raises(ValueError, match="qk_norm"):
        to_huggingface(tmp_path / "modern", tmp_path / "deep" / "out")
    with pytest.raises(FileNotFoundError, match="is no run"):
        to_huggingface(tmp_path, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken exists already"):
        to_huggingface(tmp_path / "run", tmp_path / "taken")
    with pytest.raises(ValueError, match="taken exists already"):
        from_huggingface(tmp_path / "run", tmp_path / "taken")
    with pytest.raises(ValueError, match=r"not a folder|not there"):
        from_huggingface(tmp_path / "nowhere", tmp_path / "out")
    huggingface.save(tmp_path / "bare", gpt2_tiny(), drawn(gpt2_tiny()))
    with pytest.raises(ValueError, match=r"no tokenizer .*bare with --tokenizer"):
        from_huggingface(tmp_path / "bare", tmp_path / "out")
    for arguments, words in {
        "--out out": "neither of --run and --hf",
        "--out out --run run --hf run": "both of --run and --hf",
        "--out out --run run --tokenizer bytes": "leave --tokenizer out",
        "--out out --hf run --step 3": "leave --step out",
    }.items():
        with pytest.raises(ValueError, match=words):
            call(convert, monkeypatch, *arguments.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "modern", "run", "taken"]


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"prompt": {"vectors": jnp.ones((2, 32))}}, "a prompt's vectors"),
        ({"score": {"grams": {"embedding": jnp.ones((8, 2))}}}, "scores of n-grams"),
    ],
)
def test_what_lies_beside_a_model_is_not_left_out_without_a_word(
    tmp_path, tokenizers, monkeypatch, beside, words
):
    run = make_run(tmp_path / "run", gpt2_tiny(), tokenizers["bytes"])
    found = open_run(run)
    opened = dataclasses.replace(found, params=found.params | beside)
    for module in (convert, export):
        monkeypatch.setattr(module, "open_run", lambda *given: opened)
    with pytest.raises(ValueError, match=f"transformers has no place for {words}"):
        to_huggingface(run, tmp_path / "out")
    for kind in ("gguf", "onnx", "huggingface"):
        with pytest.raises(ValueError, match=f"no place for {words} .*--format native"):
            run_command(Export(run, kind, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    run_command(Export(run, "native", tmp_path / "out"))
    assert_same(load_native(tmp_path / "out")[1], opened.params)


def test_a_failure_half_way_leaves_nothing(tmp_path, tokenizers, monkeypatch):
    make_run(tmp_path / "run", gpt2_tiny(), tokenizers["bytes"])
    to_huggingface(tmp_path / "run", tmp_path / "hf")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("experiments.convert.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        from_huggingface(tmp_path / "hf", tmp_path / "again")
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        to_huggingface(tmp_path / "run", tmp_path / "hf2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]


def test_a_tokenizer_that_transformers_cannot_hold_is_left_out_and_said(
    tmp_path, tokenizers, monkeypatch
):
    def unigram(files, end):
        raise ValueError("the SentencePiece model is no byte-pair one")

    monkeypatch.setitem(sys.modules["train.tokenizers.export"]._EXPORTS, "bytes", unigram)
    make_run(tmp_path / "run", gpt2_tiny(), tokenizers["bytes"])
    lines = to_huggingface(tmp_path / "run", tmp_path / "hf")
    assert "tokenizer    left out: the SentencePiece model is no byte-pair one" in lines
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_unigram_sentencepiece_model_is_one_of_those(tmp_path):
    import io

    import sentencepiece

    from train.tokenizers.export import export_files
    from train.tokenizers.sentencepiece import open_sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 9),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    open_sentencepiece(model.getvalue()).save(tmp_path)
    with pytest.raises(ValueError, match="no byte-pair one"):
        export_files(tmp_path)


@pytest.mark.hf
@pytest.mark.parametrize("kind", ["bytes", "gpt2", "sentencepiece"])
@pytest.mark.parametrize("config", [gpt2_tiny(), llama_tiny()], ids=["gpt2", "llama"])
def test_transformers_opens_the_folder(tmp_path, tokenizers, config, kind):
    """The same tokens, the same text back, the same logits, the same end."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    run = open_run(make_run(tmp_path / "run", config, tokenizers[kind]))
    to_huggingface(tmp_path / "run", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = run.tokenizer.encode(TEXT).tolist()
    assert theirs.encode(TEXT) == ids
    assert theirs.decode(ids) == TEXT
    assert theirs.eos_token_id == run.tokenizer.end_of_document
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.config.eos_token_id == run.tokenizer.end_of_document
    tokens = np.array([ids[: config.max_length]])
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    ours = logits_of(run.model, run.params, jnp.asarray(tokens))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(ours, expected, atol=1e-4)
