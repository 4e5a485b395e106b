"""Models of every known family: which matrices are watched, and that their spectra are those of the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from pullback.methods.layer_gradients import GradientSpectrum, split_heads, split_outputs
from pullback.methods.layer_gradients.tests import cases as models
from pullback.methods.layer_gradients.tests import reference

_spectrum: Any = GradientSpectrum  # with arguments of wrong types
STATS = ("nuclear", "sigma1_ratio", "effective_rank", "frobenius", "sigma_max")


def loss_of(model, ids):
    scores = models.logits(model, ids)
    return nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def expected(model, ids, weights):
    """Reference statistics of parts of weights: (name, index) -> statistics."""
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    names = list(dict.fromkeys(name for name, _ in weights.values()))
    grads = dict(
        zip(names, reference.gradients(loss_of(model, ids), [parameters[n] for n in names]), strict=True)
    )
    return {key: reference.statistics(grads[name][part]) for key, (name, part) in weights.items()}


ALL = (slice(None), slice(None))


def rows(a, b):
    return slice(a, b), slice(None)


def columns(a, b):
    return slice(None), slice(a, b)


def named(pattern, names, layers):
    return {
        (proj, layer): (pattern.format(layer=layer, name=name), ALL)
        for proj, name in names.items() for layer in range(layers)
    }  # fmt: skip


def of_gpt2():
    found = named("transformer.h.{layer}.attn.{name}.weight", {"o": "c_proj"}, 2)
    for layer in range(2):
        for place, proj in enumerate("qkv"):
            found[proj, layer] = (
                f"transformer.h.{layer}.attn.c_attn.weight",
                columns(32 * place, 32 * place + 32),
            )
    return found


def of_torch():
    found = named("encoder.layers.{layer}.self_attn.{name}", {"o": "out_proj.weight"}, 2)
    for layer in range(2):
        for place, proj in enumerate("qkv"):
            found[proj, layer] = (
                f"encoder.layers.{layer}.self_attn.in_proj_weight", rows(32 * place, 32 * place + 32)
            )  # fmt: skip
    return found


def of_phi3():
    found = named("model.layers.{layer}.self_attn.{name}.weight", {"o": "o_proj"}, 2)
    for layer in range(2):
        for proj, start, stop in (("q", 0, 32), ("k", 32, 48), ("v", 48, 64)):
            found[proj, layer] = f"model.layers.{layer}.self_attn.qkv_proj.weight", rows(start, stop)
    return found


PROJECTIONS = {proj: f"{proj}_proj" for proj in "qkvo"}
FAMILIES = {
    "llama": (models.llama, named("model.layers.{layer}.self_attn.{name}.weight", PROJECTIONS, 3)),
    "qwen2": (models.qwen2, named("model.layers.{layer}.self_attn.{name}.weight", PROJECTIONS, 2)),
    "phi3": (models.phi3, of_phi3()),
    "bert": (
        models.bert,
        named(
            "bert.encoder.layer.{layer}.attention.self.{name}.weight",
            {"q": "query", "k": "key", "v": "value"},
            2,
        )
        | named("bert.encoder.layer.{layer}.attention.output.{name}.weight", {"o": "dense"}, 2),
    ),
    "gpt2": (models.gpt2, of_gpt2()),
    "torch": (models.encoder, of_torch()),
}


@pytest.mark.parametrize("route", ["auto", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_spectra_are_those_of_the_gradients(family, route):
    build, weights = FAMILIES[family]
    model, ids = build(), models.ids()
    wanted = expected(model, ids, weights)
    spec = GradientSpectrum(model, stats=STATS, route=route)
    record = spec.measure(lambda: loss_of(model, ids)).records[0]
    found = {
        (proj, layer): {name: record.values[name][proj][place] for name in STATS}
        for proj, numbers in spec.layers.items() for place, layer in enumerate(numbers)
    }  # fmt: skip
    assert found.keys() == wanted.keys()
    for key, each in wanted.items():
        assert found[key] == pytest.approx({name: each[name] for name in STATS}, rel=3e-4, abs=1e-9), key
        assert found[key]["nuclear"] == pytest.approx(each["nuclear"], rel=1e-5)
    assert record.nonfinite == 0


def test_grouped_queries_and_a_user_regex():
    model = models.llama(layers=12)
    assert GradientSpectrum(model, "llama").layers["k"] == tuple(range(12))  # by number, not by spelling
    pattern = r"layers\.(?P<layer>\d+)\.self_attn\.(?P<proj>[qkvo])_proj"
    assert GradientSpectrum(model, pattern).layers == GradientSpectrum(model).layers
    some = GradientSpectrum(model, r"layers\.(?P<layer>[37])\.mlp\.(?P<proj>up|down)_proj")
    assert some.layers == {"up": (3, 7), "down": (3, 7)}


def test_a_splitter_divides_a_fused_weight_as_the_user_says():
    model, ids = models.gpt2(), models.ids()
    whole = GradientSpectrum(model).measure(lambda: loss_of(model, ids)).records[0]
    halves = GradientSpectrum(
        model,
        r"h\.(?P<layer>\d+)\.attn\.c_attn\.weight",
        splitter=lambda name, weight: split_outputs(a=32, rest=64),
    )
    found = halves.measure(lambda: loss_of(model, ids)).records[0]
    assert found.values["nuclear"]["a"] == pytest.approx(whole.values["nuclear"]["q"], rel=1e-5)
    listed = split_heads(("q", "k", "v"), heads=4, width=8)
    assert listed["k"][:9] == (8, 9, 10, 11, 12, 13, 14, 15, 32)
    wanted = expected(
        model, ids, {"k": ("transformer.h.0.attn.c_attn.weight", (slice(None), list(listed["k"])))}
    )
    heads = GradientSpectrum(model, r"h\.(?P<layer>\d+)\.attn\.c_attn\.weight", splitter=lambda *_: listed)
    found = heads.measure(lambda: loss_of(model, ids)).records[0]
    assert found.values["nuclear"]["k"][0] == pytest.approx(wanted["k"]["nuclear"], rel=1e-5)


def test_a_splitter_may_leave_weights_whole():
    model = models.llama()
    spec = GradientSpectrum(model, "llama", splitter=lambda name, weight: None)
    assert list(spec.layers) == ["q", "k", "v", "o"]


# --- shared weights -------------------------------------------------------------------------------------------------


def test_a_module_used_in_every_layer_is_one_matrix():
    model = models.mlp()
    model.layers[1] = model.layers[0]
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    check_tied(model, x, {"weight": (0,)})


def test_a_weight_shared_by_two_layers_is_reported_once():
    model = models.mlp(layers=3)
    model.layers[2].weight = model.layers[0].weight
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    check_tied(model, x, {"weight": (0, 1)})


def check_tied(model, x, layers):
    (wanted,) = reference.gradients(model(x).square().sum(), [model.layers[0].weight])
    for route in ("auto", "dense"):
        spec = GradientSpectrum(model, models.LINEAR, reduction="batch", route=route)
        assert spec.layers == layers
        record = spec.measure(lambda: model(x).square().sum()).records[0]
        assert record.values["nuclear"]["weight"][0] == pytest.approx(
            reference.statistics(wanted)["nuclear"], rel=1e-5
        )


def test_an_embedding_tied_to_the_output_counts_both_uses():
    model, ids = models.llama(tie_word_embeddings=True), models.ids()
    wanted = expected(model, ids, {"e": ("model.embed_tokens.weight", ALL)})["e"]
    outer = Numbered(model)
    spec = GradientSpectrum(outer, r"layers\.(?P<layer>\d+)\.model\.(?P<proj>embed_tokens)")
    record = spec.measure(lambda: loss_of(outer, ids)).records[0]
    assert record.values["nuclear"]["embed_tokens"][0] == pytest.approx(wanted["nuclear"], rel=1e-5)


class Numbered(nn.Module):
    """A model inside a list, so that every weight has a number in its name."""

    def __init__(self, model):
        super().__init__()
        self.layers = nn.ModuleList([model])

    def forward(self, input_ids):
        return self.layers[0](input_ids=input_ids)


# --- what is and is not computed ------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Shapes of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in {torch.ops.aten.t, torch.ops.aten.detach, torch.ops.aten.clone}:
            self.seen |= {tuple(each.shape[-2:]) for each in (out if isinstance(out, tuple) else [out])
                          if isinstance(each, torch.Tensor) and each.dim() > 1}  # fmt: skip
        return out


@pytest.mark.parametrize(("route", "formed"), [("auto", False), ("low_rank", False), ("dense", True)])
def test_short_responses_never_form_a_gradient(route, formed):
    model = models.mlp(width=20)
    x = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1))[: 1 if route == "dense" else 2]
    spec = GradientSpectrum(model, models.LINEAR, route=route)
    with Shapes() as shapes:
        spec.measure(lambda: model(x).square().sum((1, 2)))
    assert ((20, 20) in shapes.seen) == formed


def test_an_activation_in_place_on_a_view_is_followed():
    class Conv1D(nn.Linear):
        """Linear by another name: the weight is stored the other way round, the output is a view."""

        def forward(self, x):  # ty: ignore[lost-keyword-for-regular-parameter]
            out = torch.addmm(self.bias, x.flatten(0, -2), self.weight)
            return out.view(*x.shape[:-1], -1)

    model = models.mlp()
    model.layers[1] = Conv1D(6, 6)
    x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))

    def loss():
        return torch.tanh(nn.functional.elu_(model.layers[1](torch.tanh(model.layers[0](x))))).sum()

    wanted = reference.gradients(loss(), [each.weight for each in model.layers])
    spec = GradientSpectrum(model, models.LINEAR, reduction="batch")
    found = spec.measure(loss).records[0].values["nuclear"]["weight"]
    assert found == pytest.approx([reference.statistics(each)["nuclear"] for each in wanted], rel=1e-5)


def test_torchs_fused_attention_is_not_taken():
    model, ids = models.encoder(), models.ids()
    with torch.no_grad():
        plain = loss_of(model, ids)
    spec = GradientSpectrum(model, stats=("nuclear", "nuclear_per_loss"))
    with torch.no_grad():
        record = spec.measure(lambda: loss_of(model, ids)).records[0]
    assert min(min(row) for row in record.values["nuclear"].values()) > 0
    assert record.loss == pytest.approx(float(plain), rel=1e-5)
    feed_forward = GradientSpectrum(model, r"layers\.(?P<layer>\d+)\.(?P<proj>linear\d)", reduction="batch")
    assert feed_forward.measure(lambda: loss_of(model, ids)).records[0].values["nuclear"]["linear1"][0] > 0


def test_a_parametrised_layer_has_the_gradient_of_its_computed_weight():
    model = models.mlp()
    parametrizations.weight_norm(model.layers[0])
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    weight = model.layers[0].weight.detach().requires_grad_()
    hidden = torch.tanh(nn.functional.linear(x, weight, model.layers[0].bias))
    (wanted,) = reference.gradients(torch.tanh(model.layers[1](hidden)).sum(), [weight])
    pattern = r"layers\.(?P<layer>\d+)\.(?P<proj>weight)$"
    spec = GradientSpectrum(model, pattern, reduction="batch")
    assert spec.layers == {"weight": (0, 1)}
    record = spec.measure(lambda: model(x).sum()).records[0]
    assert record.values["nuclear"]["weight"][0] == pytest.approx(
        reference.statistics(wanted)["nuclear"], rel=1e-5
    )
    dense = GradientSpectrum(model, pattern, reduction="batch", route="dense")
    with pytest.raises(ValueError, match=r"parametrised weight 'layers.0.weight', got 'dense'"):
        dense.measure(lambda: model(x).sum())


# --- refusals -------------------------------------------------------------------------------------------------------


def test_no_match_lists_what_there_is():
    with pytest.raises(
        ValueError, match=r"got None, which finds none. Presets: llama, bert, gpt2, torch. .* layers.N.weight"
    ):
        GradientSpectrum(models.mlp())
    with pytest.raises(
        ValueError, match=r"got 'gpt2', which finds none.*model.layers.N.self_attn.q_proj.weight"
    ):
        GradientSpectrum(models.llama(), "gpt2")
    with pytest.raises(ValueError, match="without any"):
        GradientSpectrum(nn.ReLU())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = models.llama(1), models.encoder()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientSpectrum(Two()), "presets llama, torch fit"),
        (lambda: GradientSpectrum(models.mlp(), "(?P<layer>"), "regular expression"),
        (lambda: GradientSpectrum(models.mlp(), r"layers\.(\d+)"), "named groups layer and proj"),
        (
            lambda: GradientSpectrum(models.mlp(), r"(?P<layer>layers)\.(?P<proj>\d)"),
            "whole number as layer, got 'layers'",
        ),
        (
            lambda: GradientSpectrum(models.llama(), r"layers\.(?P<layer>\d+).*(?P<proj>proj)"),
            "a name of its own",
        ),
        (lambda: _spectrum(models.mlp(), 3), "match must be a string"),
        (lambda: _spectrum(models.mlp(), models.LINEAR, splitter=3), "splitter must be a function"),
        (
            lambda: GradientSpectrum(models.mlp(), models.LINEAR, splitter=lambda *_: {"a": [6]}),
            "some of the 6 outputs",
        ),
        (
            lambda: GradientSpectrum(models.mlp(), models.LINEAR, splitter=lambda *_: {"a": slice(6, 9)}),
            "some of the 6",
        ),
        (lambda: GradientSpectrum(models.mlp().to("meta"), models.LINEAR), "on the meta device"),
        (
            lambda: GradientSpectrum(models.encoder(), route="low_rank"),
            "route='low_rank' must meet linear layers",
        ),
    ],
    ids=[
        "two",
        "broken",
        "unnamed",
        "word",
        "names",
        "type",
        "splitter",
        "outside",
        "empty",
        "meta",
        "low_rank",
    ],
)
def test_bad_matches_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_lazy_quantised_and_inference_weights_are_refused():
    lazy = nn.ModuleDict({"layers": nn.ModuleList([nn.LazyLinear(3)])})
    with pytest.raises(ValueError, match=r"lazy weight 'layers.0.weight'"):
        GradientSpectrum(lazy, models.LINEAR)
    model = models.mlp()
    model.layers[0].weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"'layers.0.weight' of dtype torch.uint8. Dequantise"):
        GradientSpectrum(model, models.LINEAR)
    with torch.inference_mode():
        model = models.Mlp()
    with pytest.raises(ValueError, match="made in inference_mode"):
        GradientSpectrum(model, models.LINEAR)
