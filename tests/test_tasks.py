"""Tasks: batches, rows in arrays, and that the loss is the one that is written down."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runs.assemble import assemble
from experiments.tasks.table import TASKS
from model.flops import abstract_params
from model.heads import init_head, pool, without_heads
from model.presets import modern_tiny
from model.transformer import Transformer
from train.losses import counts_of, loss_function
from train.plugs import Context
from train.settings import Phase, Settings, from_json, to_json
from train.tasks.classification import Classification
from train.tasks.regression import Regression
from train.tasks.rows import Row, RowFormat
from train.tasks.task import TaskFiles
from train.tasks.text import columns_of, encode_rows
from train.tokenizers.tokenizer import load_tokenizer

T = 16
CONFIG = modern_tiny(vocabulary_size=257)
LINES = [f"{'good' if n % 3 else 'bad'} number {n}\t{'yes' if n % 3 else 'no'}" for n in range(13)]


@pytest.fixture
def files(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\n" + "\n".join(LINES) + "\n")
    return TaskFiles((("train", str(path)), ("valid", str(path))))


def drawn(task, config=CONFIG):
    """Parameters at a visible scale, the head's too."""
    params = {**abstract_params(config), **task.head(jax.random.key(0), config)}
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten(
        [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )


def loss_of(task, params, batch, config=CONFIG, label_smoothing=0.0):
    model = Transformer(config)
    terms = task.terms(model, label_smoothing)
    counts = counts_of(terms, batch)
    return loss_function(model, terms)(params, batch, Context(0, None, {}, {}, counts))[0]


def arrays_of(task, tokenizer="bytes", length=T):
    return task.examples("train", load_tokenizer(tokenizer), length)


def test_templates():
    rows = [Row(1, {"text": "ab", "text2": "c"}), Row(2, {"text": "d", "text2": "ef"})]
    end, tokenizer = 256, load_tokenizer("bytes")

    def ids(template):
        return [row.tolist() for row in encode_rows(rows, template, tokenizer)]

    a, b, c, d, e, f = b"abcdef"
    assert ids("{end}{text}{end}{text2}{end}") == [
        [end, a, b, end, c, end],
        [end, d, end, e, f, end],
    ]
    assert ids("{text2}-{text}") == [[c, ord("-"), a, b], [e, f, ord("-"), d]]
    assert columns_of("{end}x{text2} {text} {text2}") == ("text2", "text")
    for wrong, why in (("{end}", "no column"), ("{text", "is none"), ("{text.a}", "names no col")):
        with pytest.raises(ValueError, match=why):
            columns_of(wrong)


def test_of_a_pair_the_longer_text_is_cut(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(f"text,text2,label\n{'a' * 70},{'b' * 10},yes\n{'a' * 5},{'b' * 70},no\n")
    form = RowFormat(columns=(("text2", "text2"),))
    found = arrays_of(Classification(TaskFiles((("train", str(path)),), form)).resolve(), length=24)
    assert found.cut == 2
    end = [256]
    first, second = found.arrays["tokens"].tolist()
    assert first == [*end, *b"a" * 11, *end, *b"b" * 10, *end]
    assert second == [*end, *b"a" * 5, *end, *b"b" * 16, *end]
    with pytest.raises(ValueError, match="rows of 4 tokens hold no text in 5 parts"):
        arrays_of(Classification(TaskFiles((("train", str(path)),), form)).resolve(), length=4)


def test_labels_may_be_called_otherwise(files):
    names = (("yes", "POSITIVE"), ("no", "NEGATIVE"))
    task = Classification(files, rename=names).resolve()
    assert task.labels == ("NEGATIVE", "POSITIVE")
    plain = arrays_of(Classification(files).resolve()).arrays["labels"]
    np.testing.assert_array_equal(arrays_of(task).arrays["labels"], plain)
    with pytest.raises(ValueError, match="rename gives GOOD; the labels are no, yes"):
        Classification(files, labels=("no", "yes"), rename=(("yes", "GOOD"),)).resolve()
    with pytest.raises(ValueError, match="label twice"):
        Classification(files, rename=(("yes", "a"), ("yes", "b")))


def test_rows_are_cut_and_keep_their_end(files):
    task = Classification(files).resolve()
    examples = arrays_of(task, length=8)
    assert examples.cut == examples.size == 13
    assert examples.arrays["tokens"][0].tolist() == [256, *b"bad nu", 256]
    whole = arrays_of(task, length=40)
    assert whole.cut == 0
    row = whole.arrays
    n = row["lengths"][0]
    assert row["tokens"][0, :n].tolist() == [256, *b"bad number 0", 256]
    assert not row["tokens"][0, n:].any()
    np.testing.assert_array_equal(row["targets"][:, :-1], row["tokens"][:, 1:])
    np.testing.assert_array_equal(row["weights"].sum(axis=1), row["lengths"] - 1)


def test_a_second_sentence_is_read_wherever_it_is_named(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("a|b|yes\nc|d|no\n")
    for form in (
        RowFormat(separator="|", names=("text", "text2", "label")),
        RowFormat((("text2", "other"),), "|", ("text", "other", "label")),
    ):
        task = Classification(TaskFiles((("train", str(path)), ("valid", str(path))), form))
        found = arrays_of(task.resolve()).arrays
        assert found["tokens"][0, :5].tolist() == [256, 97, 256, 98, 256]


def test_a_share_of_the_rows_is_drawn_and_of_no_other_split(files):
    half = Classification(dataclasses.replace(files, share=0.5, share_seed=3)).resolve()
    found = arrays_of(half)
    lines = [row.line for row in found.rows]
    assert len(lines) == found.size == round(0.5 * len(LINES))
    assert lines == sorted(lines)
    whole = arrays_of(Classification(files).resolve())
    at = [[row.line for row in whole.rows].index(line) for line in lines]
    for name, array in found.arrays.items():
        assert np.array_equal(array, whole.arrays[name][at])
    assert half.examples("valid", load_tokenizer("bytes"), T).size == len(LINES)


def test_labels_come_from_the_training_file_and_no_other(files, tmp_path):
    task = Classification(files).resolve()
    assert task.labels == ("no", "yes")
    path = tmp_path / "valid.tsv"
    path.write_text("text\tlabel\nfine\tyes\nodd\tmaybe\n")
    paths = (("train", dict(files.paths)["train"]), ("valid", str(path)))
    other = Classification(TaskFiles(paths)).resolve()
    with pytest.raises(ValueError, match=r"line 3: the label 'maybe' is not among .*no, yes"):
        other.examples("valid", load_tokenizer("bytes"), T)
    numbers = tmp_path / "numbers.tsv"
    numbers.write_text("text\tlabel\n" + "".join(f"a\t{n}\n" for n in (10, 9, 2)))
    paths = (("train", str(numbers)), ("valid", str(numbers)))
    assert Classification(TaskFiles(paths)).resolve().labels == ("2", "9", "10")
    one = tmp_path / "one.tsv"
    one.write_text("text\tlabel\na\t1\n")
    with pytest.raises(ValueError, match="the label 1 alone"):
        Classification(TaskFiles((("train", str(one)), ("valid", str(one))))).resolve()


def test_files_are_known_by_their_content(files):
    task = Classification(files).resolve()
    assert task.resolve() == task
    path = dict(files.paths)["train"]
    with open(path, "a") as file:
        file.write("more\tyes\n")
    with pytest.raises(ValueError, match="has changed"):
        task.resolve()
    with pytest.raises(ValueError, match=r"no valid file \(it has train, test\); give one: --data"):
        Classification(TaskFiles((("train", path), ("test", path)))).resolve()


def test_settings_go_through_json(files):
    for task in (Classification(files, words=(("yes", "good"),), by="words"), Regression(files)):
        settings = Settings(phases=(Phase(1, CONFIG),), data=(), task=task)
        assert from_json(to_json(settings), tasks=TASKS) == settings
    with pytest.raises(ValueError, match="no task"):
        from_json(to_json(settings))


# Losses


@pytest.mark.variants(1)
@pytest.mark.parametrize("how", ["last", "mean"])
def test_the_loss_is_its_formula(files, strict, how):
    """Features of the last token, or their mean, by a softmax written out row by row."""
    task = Classification(files, pool=how, language_weight=0.5).resolve()
    arrays = arrays_of(task).arrays
    params = drawn(task)
    batch = {name: jnp.asarray(array[:5]) for name, array in arrays.items()}
    value = jax.jit(lambda p: loss_of(task, p, batch, label_smoothing=0.1))(params)

    model, bare = Transformer(CONFIG), without_heads(params)
    final = jax.jit(lambda p: model.apply({"params": p}, batch["tokens"], method="features").final)(
        bare
    )
    expected = 0.0
    for row in range(5):
        n = int(arrays["lengths"][row])
        taken = np.asarray(final[row, n - 1] if how == "last" else final[row, :n].mean(axis=0))
        log_p = np.asarray(jax.nn.log_softmax(taken @ np.asarray(params["score"]["kernel"])))
        expected += -0.9 * log_p[arrays["labels"][row]] - 0.1 * log_p.mean()
    logits = jax.jit(lambda p: model.apply({"params": p}, batch["tokens"]))(bare)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    nats = [
        -log_p[row, t, arrays["targets"][row, t]]
        for row in range(5)
        for t in range(int(arrays["lengths"][row]) - 1)
    ]
    np.testing.assert_allclose(value, expected / 5 + 0.5 * np.mean(nats), rtol=1e-5)


@pytest.mark.variants(1)
@pytest.mark.parametrize("kind", [Classification, Regression])
def test_gradients_are_finite_differences(tmp_path, kind):
    """Of the head and of the embedding of tokens that are there, in float64."""
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\nabc\t1\nde\t4\nbca\t2\n")
    with jax.enable_x64(True):
        task = kind(TaskFiles((("train", str(path)), ("valid", str(path))))).resolve()
        config = dataclasses.replace(CONFIG, dtype="float64", parameter_dtype="float64")
        batch = {name: jnp.asarray(a) for name, a in arrays_of(task, length=6).arrays.items()}
        params = jax.tree.map(lambda a: a.astype(jnp.float64), drawn(task, config))
        loss = jax.jit(lambda p: loss_of(task, p, batch, config))
        grads = jax.jit(jax.grad(lambda p: loss_of(task, p, batch, config)))(params)
        key, eps = jax.random.key(7), 1e-5
        for path in (("score", "kernel"), ("token_embedding", "embedding")):
            direction = jax.random.normal(key, params[path[0]][path[1]].shape, jnp.float64)

            def moved(by, path=path, direction=direction):
                leaf = params[path[0]][path[1]] + by * direction
                return {**params, path[0]: {**params[path[0]], path[1]: leaf}}

            slope = (loss(moved(eps)) - loss(moved(-eps))) / (2 * eps)
            exact = (grads[path[0]][path[1]] * direction).sum()
            np.testing.assert_allclose(slope, exact, rtol=1e-6, atol=1e-9)
            assert abs(exact) > 1e-3


@pytest.mark.variants(1)
@pytest.mark.parametrize("make", [Classification, lambda f: Classification(f, by="words")])
def test_padding_changes_nothing(files, make):
    """Neither rows of zeros, nor what stands right of a row's end."""
    task = make(files).resolve()
    arrays = arrays_of(task, length=24).arrays
    batch = {name: jnp.asarray(array[:4]) for name, array in arrays.items()}
    padded = {
        name: jnp.concatenate([array, jnp.zeros((3, *array.shape[1:]), array.dtype)])
        for name, array in batch.items()
    }
    last = 24 - np.argmax(arrays["weights"][:4, ::-1] > 0, axis=1)  # a target, one further on
    ends = np.arange(24)[None] > last[:, None]
    changed = {**batch, "tokens": jnp.where(ends, 65, batch["tokens"])}
    assert (changed["tokens"] != batch["tokens"]).any()
    params = drawn(task)
    value_and_grad = jax.jit(jax.value_and_grad(lambda p, b: loss_of(task, p, b)))
    value, grads = value_and_grad(params, batch)
    assert float(optax_norm(grads)) > 1e-3
    for other in (padded, changed):
        again, new = value_and_grad(params, other)
        np.testing.assert_allclose(value, again, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(new), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    outputs = jax.jit(task.outputs(Transformer(CONFIG)))
    one, two = (outputs(params, each)["logits"] for each in (batch, padded))
    np.testing.assert_allclose(one, two[:4], rtol=1e-5, atol=1e-6)


def optax_norm(tree):
    return jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(tree)))


def test_pooled_features_do_not_depend_on_the_order_of_time():
    """Over the axis `context` rows are cut out of order; their positions go with them."""
    final = jax.random.normal(jax.random.key(0), (3, 6, 4))
    lengths, order = jnp.array([6, 3, 0]), np.array([0, 5, 1, 4, 2, 3])
    positions = jnp.broadcast_to(order, (3, 6))
    for how in ("last", "mean"):
        straight = pool(final, lengths, how)
        turned = pool(final[:, order], lengths, how, positions)
        np.testing.assert_allclose(straight, turned, rtol=1e-6, atol=1e-7)
        assert not straight[2].any()
    with pytest.raises(ValueError, match="last, mean"):
        pool(final, lengths, "max")


# Labels as words


def test_labels_as_words_are_told_apart_where_they_differ(files):
    words = (("yes", "so good"), ("no", "so bad"))
    task = Classification(files, by="words", words=words, template="{text} is").resolve()
    assert task.head(jax.random.key(0), CONFIG) == {}
    examples = arrays_of(task, length=40)
    arrays = examples.arrays
    row, n = 1, int(arrays["lengths"][1])
    assert bytes(arrays["tokens"][row, :n].tolist()) == b"good number 1 is so "
    assert arrays["candidates"][row].tolist() == [ord("b"), ord("g")]  # of "no", "yes"
    scored = arrays["weights"][row] > 0
    assert bytes(arrays["targets"][row][scored].tolist()) == b" so good"
    assert arrays["targets"][row, n - 1] == ord("g")
    short = arrays_of(task, length=14)
    assert short.cut == 13
    kept = short.arrays["tokens"][row, : short.arrays["lengths"][row]]
    assert bytes(kept.tolist()) == b"r 1 is so "

    params = drawn(task)
    batch = {name: jnp.asarray(a[:3]) for name, a in arrays.items()}
    logits = jax.jit(task.outputs(Transformer(CONFIG)))(params, batch)["logits"]
    whole = jax.jit(lambda p: Transformer(CONFIG).apply({"params": p}, batch["tokens"]))(params)
    at = np.asarray(arrays["lengths"][:3]) - 1
    expected = np.asarray(whole)[np.arange(3), at][:, [ord("b"), ord("g")]]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)

    same = Classification(files, by="words", words=(("yes", "a"), ("no", "ab"))).resolve()
    with pytest.raises(ValueError, match="not told apart by one piece"):
        arrays_of(same)
    with pytest.raises(ValueError, match="no room"):
        arrays_of(task, length=8)


def test_settings_that_mean_nothing_are_refused(files):
    for change in (
        {"pool": "max"},
        {"dropout": 1.0},
        {"language_weight": -1.0},
        {"template": "{text} {label}"},
        {"words": (("yes", "a"),)},
        {"by": "hand"},
    ):
        named = "label" if "template" in change else next(iter(change))
        with pytest.raises(ValueError, match=named):
            Classification(files, **change)
    with pytest.raises(ValueError, match="pool, dropout"):
        Classification(files, by="words", pool="mean")
    with pytest.raises(ValueError, match="words has maybe; the labels are no, yes"):
        Classification(files, by="words", words=(("maybe", "x"),)).resolve()
    with pytest.raises(ValueError, match="label_smoothing"):
        Regression(files).terms(Transformer(CONFIG), 0.1)


def test_regression_is_in_standard_deviations(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\nabc\t1.5\nde\t4\nbca\t-2\n")
    task = Regression(TaskFiles((("train", str(path)), ("valid", str(path))))).resolve()
    values = arrays_of(task).arrays["values"]
    np.testing.assert_allclose([values.mean(), values.std()], [0, 1], atol=1e-6)
    np.testing.assert_allclose(values * task.scale + task.mean, [1.5, 4, -2], rtol=1e-6)
    path.write_text("text\tlabel\nabc\t1.5\nde\tnan\n")
    with pytest.raises(ValueError, match="line 3: 'nan' is no finite number"):
        Regression(TaskFiles((("train", str(path)), ("valid", str(path))))).resolve()


# The head


def test_the_language_models_own_head_stays_where_it_has_no_part(files):
    """A head of the task is drawn once; what the loss does not reach is frozen."""
    task = Classification(files).resolve()
    untied = modern_tiny(vocabulary_size=257, tied_head=False)
    settings = Settings(phases=(Phase(1, untied),), data=(), task=task)
    parts = assemble(settings, untied)
    trained, fixed = jax.eval_shape(parts.plugs.split, abstract_params(untied))
    assert set(fixed) == {"head"}
    assert trained["score"]["kernel"].shape == (32, 2)
    both = dataclasses.replace(settings, task=dataclasses.replace(task, language_weight=0.1))
    _, fixed = jax.eval_shape(assemble(both, untied).plugs.split, abstract_params(untied))
    assert fixed == {}
    with pytest.raises(ValueError, match="z_loss"):
        assemble(dataclasses.replace(settings, z_loss=1e-4), untied)
    kernel = init_head(jax.random.key(0), 512, 4, jnp.float32)["kernel"]
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)
