"""styledrop.py: guidance by separate passes, tuning by Eq. 3, files that are whole or not there."""

import math
import platform
import random
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TOKENIZER, VOCABULARY, noise_images, save_merges, toy_muse

import muse as muse_
import styledrop
from clip_feedback import load_clip
from muse import PRESETS, SUPERRES, Muse
from styledrop import (AT_ONCE, LAMBDA_A, LAMBDA_A_WORDS, SECOND_TUNING, StyleDrop, fingerprint,
                       guided_logits, load_adapter, mix_logits, partial_prefix, save_model,
                       style_prompt, to_tensor, to_uint8, write_whole)

PROMPTS, NULL = ["a cat", "a house"], ["", ""]
PHRASE = "watercolor painting"
styled = [style_prompt(p, PHRASE) for p in PROMPTS]
close = lambda x, y: torch.allclose(x, y, atol=1e-4, rtol=1e-4)
same = lambda a, b: all(map(torch.equal, a, b))
small = lambda images: F.interpolate(images, (16, 16), mode="area")


# -- equations

def test_equations():
    """(1 + lA) G^(t) + (lB - lA) G(t) - lB G(n): 3, 3, -5 at (2, 5). t is as in Table S4.
    Trap: G^(t) - G^(n) or G^(t) - G(n) in the lB term, which is another equation.
    """
    weights = lambda a, b: [x.item() for x in guided_logits(*torch.eye(3), a, b)]
    assert weights(2, 5) == [3, 3, -5] and weights(1, 0) == [2, -1, 0]
    assert mix_logits(style=1, content=5, gamma=0.25) == 2
    assert styled[0] == "a cat in watercolor painting style" and style_prompt("x", "") == "x"


def watch(monkeypatch):
    """The arguments of every forward pass of G, and whether it ran in bf16, as they happen."""
    seen, forward = [], Muse.forward
    monkeypatch.setattr(Muse, "forward", lambda self, *a: seen.append(
        (self, a, torch.is_autocast_enabled("cpu"))) or forward(self, *a))
    return seen


def logits_of(pipe, **options):
    """The guided logits that generate() hands to decode, for some ids; and the passes it took."""
    caught, ids = [], torch.randint(pipe.muse.config.mask_id + 1, (2, 16),
                                    generator=torch.Generator().manual_seed(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muse_, "decode", lambda fn, b, n, *rest: caught.append(fn(ids, 0))
                      or torch.zeros(b, n).long())
        calls = watch(patch)
        pipe.generate(PROMPTS, **options)
    return caught[0], len(calls), ids


FIXED = dict(lambda_a=2, lambda_b=5)
MIXED = dict(style=1, content=1, gamma=0.3, **FIXED)
EQUATIONS = [           # options, what they must give, and in how many passes
    (dict(lambda_a=3, lambda_b=2), "3 * c - 2 * n", 2),                          # Eq. 1
    (dict(style=1, **FIXED), "3 * ts + 3 * t - 5 * n", 3),                       # Eq. 4
    (dict(style=1), "ts + a * (ts - t) + (t - n)", 3),
    (dict(style=1, lambda_a=0, lambda_b=0), "ts", 2),
    (dict(style=1, negative="blurry", style_phrase="flat vector", **FIXED),
     "3 * fs + 3 * f - 5 * blurry", 3),
    (dict(style_phrase=PHRASE, **FIXED), "3 * t - 2 * c + 5 * (c - n)", 3),      # style in words
    (dict(style_phrase=["", PHRASE], **FIXED),
     "[(6 * c - 5 * n)[0], (3 * t + 3 * c - 5 * n)[1]]", 3),
    (dict(style_phrase=PHRASE, content=1, gamma=0.3, lambda_b=5),
     ".7 * (t + w * (t - c) + 5 * (c - n)) + .3 * (co + a * (co - c) + 5 * (c - n))", 5),
    (dict(content=1, **FIXED), "3 * co + 3 * c - 5 * n", 3),                     # Eq. 6
    (MIXED, ".7 * (3 * ts + 3 * t - 5 * n) + .3 * (3 * co + 3 * c - 5 * n)", 5),     # Eq. 5 and 6
    (MIXED | dict(lambda_a_content=0),
     ".7 * (3 * ts + 3 * t - 5 * n) + .3 * (co + 5 * c - 5 * n)", 5)]


@pytest.mark.parametrize("options, by_hand, passes", EQUATIONS, ids=[e[1] for e in EQUATIONS])
def test_equations_from_separate_passes(pipe, make_adapter, options, by_hand, passes):
    """c: content phrases, which carry no style word; t: with the style phrase; n: nothing; s, o:
    with the style's and the object's adapter.
    Traps: the phrase is forgotten; the tuned model sees n; a branch gets its neighbour's text or
    adapter; adapters swapped; G(t) used for c; lambda_a = lambda_b = 0 read as "no adapter".
    """
    s, o = make_adapter(1), make_adapter(2, style="teapot")
    options = options | {k: x for k, x in dict(style=s, content=o).items() if k in options}
    ours, calls, ids = logits_of(pipe, **options)
    t, c, f = styled, PROMPTS, [style_prompt(p, "flat vector") for p in PROMPTS]
    passed = dict(t=[t], ts=[t, s], c=[c], co=[c, o], n=[NULL], f=[f], fs=[f, s],
                  blurry=[["blurry"] * 2])
    g = {name: pipe.muse(ids, *pipe.embed(pipe.muse, x[0]), x[1]() if x[1:] else None)
         for name, x in passed.items()}
    assert torch.pdist(torch.stack([*g.values()]).flatten(1)).min() > 5          # no two are alike
    expected = eval(by_hand, dict(g, a=LAMBDA_A, w=LAMBDA_A_WORDS))
    assert close(ours, torch.stack([*expected])) and calls == passes


def test_g_runs_in_bf16_where_that_is_fast(pipe, make_adapter, monkeypatch):
    """Sampling and tuning alike; the logits come out in fp32 and stay near."""
    exact, *_ = logits_of(pipe, style=make_adapter())
    monkeypatch.setattr(styledrop, "fast_bf16", lambda device: True)
    seen = watch(monkeypatch)
    ours, *_ = logits_of(pipe, style=make_adapter())
    pipe.tune(noise_images(1), ["a cat"], PHRASE, steps=3)
    assert [bf16 for *_, bf16 in seen] == [True] * 6 and ours.dtype == torch.float32
    assert 0 < (ours - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("device, able, fast", [
    ("cuda", {}, True), ("mps", {"amx_bf16": True}, False), ("cpu", {"avx2": True}, False),
    ("cpu", {"amx_bf16": True, "avx512_bf16": False}, True), ("cpu", {"avx512_bf16": True}, True)])
def test_which_machines_are_fast_in_bf16(monkeypatch, device, able, fast):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert styledrop.fast_bf16(device) == fast


# -- sampling, in both stages

def tokens_of(pipe, prompts, **options):
    """What generate() draws: the tokens (B, N) of each stage, and the images."""
    drawn = {}

    def note(step, ids, kept):
        if kept.all():
            drawn.setdefault(ids.shape[1], []).append(ids)
    images = pipe.generate(prompts, on_step=note, **options)
    return *map(torch.cat, drawn.values()), images


def test_a_picture_is_its_prompt_and_its_seed(pipe2, make_adapter):
    """Picture i has seed + i: alone, at another place, beside others, behind AT_ONCE others.
    Traps: one generator for the batch, and the company decides; global chance leaks in; the seed
    is set once and runs on; numbers start again in the next batch.
    """
    prompts, done = (PROMPTS * AT_ONCE)[:AT_ONCE + 2], []
    style = make_adapter(base=pipe2.base, second=0)
    draw = lambda prompts, **k: tokens_of(pipe2, prompts, style=style, steps=2, **k)
    low, high, images = draw(prompts, seed=7, on_batch=done.append)
    assert done == [AT_ONCE, AT_ONCE + 2] and images.shape == (AT_ONCE + 2, 3, 32, 32)
    for i in (0, 3, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1):
        torch.seed(), np.random.seed()
        one, two, image = draw(prompts[i], seed=7 + i)
        assert torch.equal(one[0], low[i]) and torch.equal(two[0], high[i])
        assert torch.allclose(image[0], images[i], atol=1e-4) and image.abs().max() <= 1
    assert len(low.unique(dim=0)) == len(low)               # a cat of another seed is another cat
    assert torch.equal(draw(["a cat"] * 2, seed=[9, 7])[1], high[[2, 0]])


@pytest.mark.parametrize("words", [False, True])
def test_the_second_stage_has_lambdas_of_its_own(pipe2, make_adapter, monkeypatch, words):
    """2 G^(t) - G(t) over the low tokens, whatever lambdas the first has, in 12 steps; with the
    style in words, G(t). It draws twice the size of the first.
    Traps: a null pass that is not needed; the first's strengths; its temperature's steps.
    """
    style, caught, decode = make_adapter(base=pipe2.base, second=0), [], muse_.decode
    monkeypatch.setattr(muse_, "decode", lambda fn, *a: caught.append(fn) or decode(fn, *a))
    options = dict(style_phrase=PHRASE) if words else dict(style=style, lambda_a=3, lambda_b=5)
    calls = watch(monkeypatch)
    low, high, images = tokens_of(pipe2, PROMPTS, steps=2, **options)
    assert torch.equal(images, pipe2.vqgan.decode(high.view(2, 8, 8))) and pipe2.resolution == 32
    assert [G is pipe2.superres for G, *_ in calls] == [False] * 2 * 3 + [True] * 12 * (2 - words)
    assert all(torch.equal(a[4], low) for G, a, _ in calls if G is pipe2.superres)
    ids = torch.randint(33, (2, 64), generator=torch.Generator().manual_seed(0))
    G = lambda *a: pipe2.superres(ids, *pipe2.embed(pipe2.superres, styled), *a, low)
    assert close(caught[1](ids, 0), G(None) if words else 2 * G(style.superres()) - G(None))


@pytest.mark.parametrize("has", ["both", "style", "content", "neither"])
def test_gamma_ends_are_single_adapters_in_both_stages(pipe2, make_adapter, has):
    """Bit by bit, also where one of the two was tuned without the second stage, or is in words. An
    adapter of the second stage leaves the first as it is. Traps: a mix that is nearly the end of
    the line; at gamma 1 the style goes on drawing in the second stage, at gamma 0 the object.
    """
    draw = lambda **options: tokens_of(pipe2, PROMPTS, steps=2, **options)[:2]
    adapters, words = {}, dict(style_phrase=PHRASE)
    for name, seed in (("style", 1), ("content", 2)):
        adapters[name] = make_adapter(seed, base=pipe2.base)
        low, high = draw(**{name: adapters[name]})
        if has in ("both", name):
            adapters[name] = make_adapter(seed, base=pipe2.base, second=5)
            changed = draw(**{name: adapters[name]})
            assert torch.equal(low, changed[0]) and not torch.equal(high, changed[1])
    half = draw(**adapters, gamma=0.5)[0]
    for gamma, name in enumerate(adapters):
        alone = draw(**{name: adapters[name]})
        assert same(draw(**adapters, gamma=float(gamma)), alone)
        assert not torch.equal(half, alone[0])
    assert same(draw(content=adapters["content"], gamma=0.0, **words), draw(**words))


@pytest.mark.parametrize("role", ["style", "content"])
def test_an_adapter_of_another_base_is_refused(pipe, pipe2, make_adapter, role):
    """Also one of the same base beside another second stage. Trap: it runs, and draws noise."""
    for run, base in ((pipe, "0123456789ab"), (pipe2, pipe.base)):
        with pytest.raises(ValueError, match=f"tuned on base {base}, .* {run.base};"):
            run.generate("a cat", **{role: make_adapter(base=base)})


# -- tuning. Which theta learns, and that nothing else does: test_methods.py

@pytest.fixture(scope="session")
def references(pipe2):
    """Three pictures with different tokens, and what they show."""
    images = noise_images(3, 32, seed=5)
    assert len(pipe2.vqgan.encode(small(images)).unique(dim=0)) == 3
    return images, ["a cat", "a house and a tree", "an owl in a house"]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_what_tuning_sees(pipe2, references, monkeypatch, batch):
    """In both stages every reference, equally often, with its own prompt and low tokens; masked
    tokens stay hidden, by the law of the stage.
    Traps: the data set returns image 0 whatever the index, and a long list is for nothing
    (zideliu); low tokens of another reference; `ids` goes in where the masked ids should
    (lucidrains#11): the loss is wonderful and nothing is learned; on_step of one stage alone.
    """
    monkeypatch.setattr(styledrop, "SECOND_TUNING", replace(SECOND_TUNING, steps=6, batch=batch))
    (images, prompts), asked, said, loss = references, [], [], muse_.masked_loss
    monkeypatch.setattr(muse_, "masked_loss", lambda logits, ids, mask: asked.append(
        (ids, mask)) or loss(logits, ids, mask))
    calls = watch(monkeypatch)
    pipe2.tune(images, prompts, PHRASE, steps=6, batch=batch, on_step=lambda *a: said.append(a[:2]))
    assert said == [(step, 6) for step in range(6)] * 2 and len(calls) == len(asked) == 12
    tokens = [pipe2.vqgan.encode(x).flatten(1) for x in (small(images), images)]
    passes = list(zip(calls, asked))
    for stage, G in enumerate((pipe2.muse, pipe2.superres)):
        texts, lengths = pipe2.embed(G, [style_prompt(p, PHRASE) for p in prompts])
        counts, share = [0, 0, 0], []
        for (model, (shown, text, text_mask, _, low), _), (ids, mask) in passes[6 * stage:][:6]:
            assert model is G and len(ids) == batch and (low is None) == (stage == 0)
            assert torch.equal(shown, ids.masked_fill(mask, G.config.mask_id))
            share.append(mask.float().mean())
            for b, row in enumerate(ids):
                r = int((tokens[stage] == row).all(1).nonzero())
                counts[r] += 1
                assert torch.equal(text[b], texts[r]) and torch.equal(text_mask[b], lengths[r])
                assert low is None or torch.equal(low[b], tokens[0][r])
        assert counts == [2 * batch] * 3
        if batch == 8:                                      # the means of cos(pi u^power / 2)
            assert np.mean(share) == pytest.approx((0.78, 2 / np.pi)[stage], abs=0.07)


@pytest.mark.parametrize("is_shared", [True, False])
def test_first_step_moves_only_the_up_weights(pipe, is_shared):
    """W_u = 0 keeps the gradient from W_d, and Adam too. Trap: weight decay, or up not at zero."""
    start, one, two = (pipe.tune(noise_images(2), PROMPTS, steps=steps,
                                 is_shared=is_shared).state_dict() for steps in range(3))
    for name in start:
        assert torch.equal(start[name], one[name]) == ("down" in name)
        assert not torch.equal(one[name], two[name])


def test_the_seed_is_the_adapter(pipe2, references, monkeypatch):
    """Whatever else draws numbers. The first stage is the same bits alone and beside the second."""
    monkeypatch.setattr(styledrop, "SECOND_TUNING", replace(SECOND_TUNING, steps=1))

    def tune(images, **how):
        torch.seed()
        theta = pipe2.tune(images, references[1], PHRASE, steps=2, **how)
        first = {k: p for k, p in theta.state_dict().items() if not k.startswith("superres.")}
        return fingerprint(theta.state_dict()), fingerprint(first)
    images = references[0]
    both, first = tune(images)
    assert tune(images) == (both, first) and both != first not in tune(images, seed=1)
    assert tune(images, superres=False) == tune(small(images)) == (first, first)


CALLS = [               # a method of the pipeline, its arguments: a word of the refusal
    ("tune", (noise_images(3), PROMPTS), {}, "3 reference images .* not 2"),
    ("tune", (noise_images(1), ["a"]), dict(method="textual-inversion"), "words of the style"),
    ("tune", (noise_images(1), ["a"]), dict(method="dreambooth"), "must be one of adapter"),
    ("generate", (PROMPTS,), dict(seed=[1, 2, 3]), "3 seeds for 2 prompts"),
    ("generate", (PROMPTS,), dict(style_phrase=[PHRASE]), "1 style phrases"),
    ("generate", ([],), {}, "give prompts"),
    ("generate", ("a cat",), dict(steps=0), "at least one step"),
    ("generate", ("a cat",), dict(gamma=math.nan), "gamma from 0 to 1")]


@pytest.mark.parametrize("call, arguments, options, words", CALLS)
def test_what_does_not_fit_is_refused(pipe, call, arguments, options, words):
    """Traps: zip() drops the third reference, or the second prompt, in silence; ids without a
    value; a None mixed; another method is taken for inversion.
    """
    with pytest.raises(ValueError, match=words):
        getattr(pipe, call)(*arguments, **options)


# -- files

@pytest.fixture(scope="module")
def saved_adapter(pipe2, make_adapter, tmp_path_factory):
    """The bytes of an adapter of both stages, and what they hold."""
    path = tmp_path_factory.mktemp("run") / "adapter.pt"
    make_adapter(base=pipe2.base, second=0).save(path)
    return path.read_bytes(), torch.load(path, weights_only=True)


def read(path, load=load_adapter):
    """What a file gives: a model that can be used, or None and one line that says why not."""
    try:
        model = load(path)
    except (ValueError, OSError) as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 400
        return None
    assert all(p.isfinite().all() for p in model.parameters())
    if load is load_adapter:
        assert not any(p.requires_grad for p in model.parameters())
        assert all(isinstance(model.about.get(name, ""), str) for name in ("base", "style"))
    return model


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", ["adapter", "clip"])
def test_randomly_damaged_files(saved_adapter, weights, tmp_path, capfd, what):
    """Other bytes, a cut, bytes in between, more often at an end: a model, or one line; silence."""
    whole = saved_adapter[0] if what == "adapter" else (weights / "clip.pt").read_bytes()
    load = load_adapter if what == "adapter" else load_clip
    chance, path, read_well = random.Random(0), tmp_path / "adapter.pt", [0, 0, 0]
    assert read(path, load) is read(tmp_path, load) is None              # no file
    for content in (b"", b"hello", (weights / "muse.pt").read_bytes()):
        path.write_bytes(content)
        assert read(path, load) is read(tmp_path, load) is None
    for i in range(500):
        places = (0, len(whole)), (0, 3000), (len(whole) - 2000, len(whole))
        at, new = chance.randrange(*places[i // 3 % 3]), chance.randbytes(chance.choice((1, 300)))
        rest = (whole[at + len(new):], b"", whole[at:])[i % 3]
        path.write_bytes(whole[:at] + new * (i % 3 != 1) + rest)
        read_well[i % 3] += read(path, load) is not None
    assert 0 < read_well[0] < 160 and read_well[1] == 0 and capfd.readouterr() == ("", "")


WRONG = [None, 7, -1, float("nan"), 10 ** 30, True, "x", b"x", [], [1], {1: 2}, {"style": 7},
         {"base": None}, torch.zeros(3), torch.zeros(2, 2).to_sparse(), torch.float16]


@pytest.mark.parametrize("field", ["kind", "about", "config", "superres", "method", "weights"])
def test_wrong_types_in_an_adapter(saved_adapter, tmp_path, field):
    """Also inside of it. Traps: missing keys are filled from random weights; a traceback."""
    saved, path = saved_adapter[1], tmp_path / "adapter.pt"
    wrong = [saved | {field: value} for value in WRONG]
    wrong.append({name: value for name, value in saved.items() if name != field})
    if isinstance(saved[field], dict):
        wrong += [saved | {field: saved[field] | {name: value}} for name in list(saved[field])[:3]
                  for value in (*WRONG, torch.full((32, 4), math.nan))]
    for content in (*wrong, torch.zeros(3)):
        torch.save(content, path)
        assert read(path) is None or field == "about" and field in content


def test_a_checkpoint_runs_no_code(tmp_path):
    """Trap: a pickle that executes what it likes when a stranger's adapter is opened."""
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))
    torch.save(dict(kind="adapter", config=Bomb()), tmp_path / "adapter.pt")
    assert read(tmp_path) is None and not (tmp_path / "boom").exists()


BASE_DAMAGE = [         # a part, and what is wrong: entries of the file, or sizes of another model
    *[(part, dict(weights={}), {}) for part in ("vqgan", "clip", "muse", "superres")],
    *[("muse", {name: wrong}, {}) for name in ("merges", "words") for wrong in (None, 7, [{}])],
    ("superres", dict(merges=[]), {}), ("muse", {}, dict(codebook_size=33)),
    ("muse", {}, dict(grid=6)), ("muse", {}, dict(vocab_size=700)),
    ("superres", {}, dict(codebook_size=33)), ("superres", {}, dict(grid=4, low_grid=2))]


@pytest.mark.parametrize("part, entries, sizes", BASE_DAMAGE, ids=str)
def test_a_damaged_base_is_one_line(weights2, tmp_path, part, entries, sizes):
    """Traps: a tokenizer of 32 codes with a Muse of 33 runs, until it draws the one out of reach; a
    second stage that does not fit is left out in silence; a KeyError for a file of an old version.
    """
    path = shutil.copytree(weights2, tmp_path / "base") / f"{part}.pt"
    if sizes:
        (path.parent / "superres.pt").unlink()              # which would fit no other muse.pt
        model = toy_muse(presets=PRESETS if part == "muse" else SUPERRES, **sizes)
        save_model(path, part, model, {}, words=VOCABULARY, merges=save_merges(TOKENIZER))
    torch.save(torch.load(path, weights_only=True) | entries, path)
    with pytest.raises(ValueError, match=f"^[^\n]*{part}.pt[^\n]*$"):
        StyleDrop.load(path.parent, "cpu").clip             # CLIP is read when it is needed


def test_clip_is_only_the_judge(weights, tmp_path, pipe, make_adapter):
    """Without it, it is the same base. Trap: seconds of loading, or no picture without CLIP."""
    for name in ("vqgan.pt", "muse.pt"):
        shutil.copy(weights / name, tmp_path)
    again, style = StyleDrop.load(tmp_path, "cpu"), make_adapter()
    assert again.words == set(VOCABULARY) and again.tokenizer.merges == TOKENIZER.merges
    again.tune(noise_images(1), ["a cat"], PHRASE, steps=1)
    with pytest.raises((ValueError, FileNotFoundError), match="clip.pt"):
        again.clip
    assert torch.equal(*(p.generate("a cat", style, steps=2) for p in (again, pipe)))
    shutil.copy(weights / "clip.pt", tmp_path)
    assert again.clip is again.clip and not any(p.requires_grad for p in again.clip.parameters())


def test_fingerprint_knows_every_tensor(pipe):
    """Trap: a digest of names or shapes alone lets any base of this size pass."""
    state = pipe.muse.state_dict()
    prints = {fingerprint(state), fingerprint({name: p.clone() for name, p in state.items()})}
    for name, tensor in state.items():
        other = tensor.clone()
        other.flatten()[0] += 1e-3
        prints.add(fingerprint(state | {name: other}))
    assert len(prints) == 1 + len(state)


def test_write_whole_or_not_at_all(tmp_path):
    """Trap: a kill in the middle of torch.save costs the old checkpoint as well."""
    path = tmp_path / "new" / "file"
    write_whole(path, lambda file: file.write(b"old"))
    assert path.stat().st_mode & 0o777 == 0o644

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.rglob("*")) == [path.parent, path]


def test_leftovers_of_killed_processes(tmp_path):
    """Of a dead process of this machine, they go at the next write. What a live one has there,
    another machine (perhaps of a longer name) or anybody else stays.
    """
    dead, node = subprocess.Popen(["true"]), platform.node()
    dead.wait()
    gone = [tmp_path / f".partial-{node}-{dead.pid}-{name}" for name in ("file", "folder")]
    kept = [f"{partial_prefix()}a", f".partial-{node}-1-a", f".partial-other-{dead.pid}-a",
            f".partial-{node}-{dead.pid}-77-a", f".partial-{node}-2-{dead.pid}-a",
            f".partial-{node}-b-{dead.pid}-a", f".partial-{node}-", "adapter.pt", ".partial"]
    for path in (gone[0], *(tmp_path / name for name in kept)):
        path.write_bytes(b"half")
    (gone[1] / "run").mkdir(parents=True)
    write_whole(tmp_path / "new", lambda file: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "new"])


# -- words and pictures

def test_pixels_round_trip_exactly():
    """Traps: truncation instead of rounding darkens half of all values by one; bright ones wrap."""
    values = np.arange(3 * 256, dtype=np.uint8).reshape(2, 8, 16, 3)
    tensor = to_tensor(values)
    assert tensor.shape == (2, 3, 8, 16) and tensor.min() == -1 and tensor.max() == 1
    assert tensor[1, 2, 3, 4] == pytest.approx(values[1, 3, 4, 2] / 127.5 - 1)
    assert (to_uint8(tensor) == values).all()
    assert torch.equal(torch.tensor(to_uint8(tensor * 3) == 255).movedim(-1, 1), tensor >= 1 / 3)
