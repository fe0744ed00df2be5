"""A transformer that cannot be masked is told what was seen, where, and what it lacks."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headprobe
from headprobe.errors import UsageError

SIZE = (3, 32, 32)
DOCS = Path(__file__).resolve().parents[3] / "docs"


class Heads(nn.Module):
    """What the classes below share: three heads of 16 channels."""

    def split(self, x: Tensor, maps: nn.Linear) -> Any:
        rows, tokens, _ = x.shape
        return maps(x).reshape(rows, tokens, 3, 3, -1).permute(2, 0, 3, 1, 4)

    def join(self, heads: Tensor) -> Tensor:
        return heads.transpose(1, 2).flatten(2)


class LikeVitPytorch(Heads):
    """A softmax module of its own, `heads` and `to_out`."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.attend, self.to_qkv = 3, nn.Softmax(dim=-1), nn.Linear(48, 144, bias=False)
        self.to_out = nn.Sequential(nn.Linear(48, 48), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x, self.to_qkv)
        out: Tensor = self.to_out(self.join(self.attend(q @ k.mT / 4) @ v))
        return out


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(dim=-1)
        return torch.einsum("bhij,bhjd->bhid", weights, v)


class LikeXTransformers(Heads):
    """A helper that attends by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.attend, self.qkv, self.to_out = 3, Attend(), nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_out(self.join(self.attend(*self.split(x, self.qkv))))
        return out


class Product(nn.Module):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one @ other


class OfModules(LikeVitPytorch):
    """Products that are modules too, as relevance propagation needs them."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul1, self.matmul2 = Product(), Product()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x, self.to_qkv)
        out: Tensor = self.to_out(self.join(self.matmul2(self.attend(self.matmul1(q, k.mT)), v)))
        return out


class LikeTransformers(Heads):
    """Fused attention, `num_attention_heads` and `o_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.qkv, self.o_proj = 3, nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o_proj(self.join(F.scaled_dot_product_attention(*self.split(x, self.qkv))))
        return out


class RowsOfHeads(LikeVitPytorch):
    """Heads among the rows, so that no axis shows them."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.flatten(0, 1) for part in self.split(x, self.to_qkv))
        heads = torch.bmm(torch.bmm(q, k.mT).softmax(dim=-1), v)
        out: Tensor = self.to_out(self.join(heads.unflatten(0, (-1, 3))))
        return out


class OwnSoftmax(LikeVitPytorch):
    """Weights that are no call of softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x, self.to_qkv)
        weights = (q @ k.mT / 4).exp()
        out: Tensor = self.to_out(self.join(weights / weights.sum(dim=-1, keepdim=True) @ v))
        return out


class OneFunction(Heads):
    """All of attention in one function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.maps, self.c_proj = 3, nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        weights = (self.maps.weight, self.maps.bias, None, None, False, 0.0, self.c_proj.weight, self.c_proj.bias)
        out = F.multi_head_attention_forward(y, y, y, 48, 3, *weights, training=False, need_weights=False)
        return out[0].transpose(0, 1)


class HeadsAsNumberOfNoKind(LikeXTransformers):
    """`num_heads` that is no whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.proj = 48 / 16, self.to_out


class Usual(LikeXTransformers):
    """The two names that headprobe looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.proj = 3, nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(self.join(F.scaled_dot_product_attention(*self.split(x, self.qkv))))
        return out


class Vit(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Conv2d(3, 48, 8, 8), nn.ModuleList(layers), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.head(x.mean(1))
        return out


def vit(*classes: type[nn.Module]) -> Vit:
    torch.manual_seed(0)
    return Vit(*(cls() for cls in classes)).eval()


def refusal(model: nn.Module) -> str:
    """The one line that both `check` and `ablate` refuse a model with."""
    with pytest.raises(UsageError) as checked:
        headprobe.check(model, input_size=SIZE)
    with pytest.raises(UsageError) as ablated:
        headprobe.ablate(model, "layer:0", input_size=SIZE).__enter__()
    assert str(checked.value) == str(ablated.value)
    assert "\n" not in str(checked.value)
    return str(checked.value)


BOTH = "it needs an attribute num_heads and a sub-module proj that takes the concatenated heads"
UNLIKE: dict[type[nn.Module], str] = {
    LikeVitPytorch: f"{BOTH}; it has heads = 3 and to_out",
    LikeXTransformers: f"{BOTH}; it has heads = 3 and to_out",
    OfModules: f"{BOTH}; it has heads = 3 and to_out",
    LikeTransformers: f"{BOTH}; it has num_attention_heads = 3 and o_proj",
    RowsOfHeads: f"{BOTH}; it has heads = 3 and to_out",
    OwnSoftmax: f"{BOTH}; it has heads = 3 and to_out",
    OneFunction: "it needs a sub-module proj that takes the concatenated heads; it has c_proj",
    HeadsAsNumberOfNoKind: "it needs a whole number num_heads (it is 3.0); it has heads = 3",
}


@pytest.mark.parametrize("cls", UNLIKE)
@pytest.mark.parametrize("beside", [(), (Usual,)])
def test_attention_of_another_form_is_named_with_what_it_lacks_alone_and_beside_layers_that_could_be_masked(
    cls: type[nn.Module], beside: tuple[type[nn.Module], ...]
) -> None:
    text = refusal(vit(*beside, cls))
    place = f"computes attention in 'layers.{len(beside)}' ({__name__}.{cls.__name__}), "
    assert f"{place}which is not built as headprobe masks it: {UNLIKE[cls]}" in text
    assert "docs/heads.md" in text


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
def test_attention_in_one_call_of_torch_is_named_with_the_remedy(kind: Any) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = kind(48, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x, x, x)[0] if kind is nn.MultiheadAttention else self.inner(x)
            return out

    for model in (vit(Whole), vit(Usual, Whole)):
        assert re.search(r"in 'layers\.\d\.inner' .*hides its heads in one call: .* put a module with", refusal(model))


def test_a_graph_is_refused_as_a_graph() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10).eval()
    traced = torch.fx.symbolic_trace(model)
    assert "is a graph of operations (torch.fx) and computes attention in its node 'scaled_dot" in refusal(traced)
    exported: Any = torch.export.export(model, (torch.zeros(2, *SIZE),)).module()
    assert "is a graph of operations (torch.fx)" in refusal(exported)


def test_torchvisions_windows_are_refused_because_their_projection_is_never_called() -> None:
    class OnlyWeights(Usual):
        def forward(self, x: Tensor) -> Tensor:
            heads = self.join(F.scaled_dot_product_attention(*self.split(x, self.qkv)))
            return F.linear(heads, self.proj.weight, self.proj.bias)

    assert "its forward pass does not call 'layers.0.proj'" in refusal(vit(OnlyWeights))


def test_a_part_compiled_by_torch_compile_is_refused() -> None:
    model: Any = vit(Usual, Usual)
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    assert "is compiled, so hooks would be ignored" in refusal(model)


def test_a_convolutional_model_is_told_which_of_its_parts_attends_without_heads() -> None:
    model = timm.create_model("gcresnet33ts").eval()
    with pytest.raises(UsageError, match=r"no attention heads \(what attends in 'stages\.0\.0\.attn', .*GlobalContext"):
        headprobe.check(model, input_size=(3, 64, 64))


@pytest.mark.parametrize("call", [headprobe.check, lambda model: headprobe.ablate(model, "layer:0").__enter__()])
@pytest.mark.parametrize("what", [None, "vit_tiny_patch16_224", {}])
def test_what_is_no_model_is_refused(call: Any, what: Any) -> None:
    with pytest.raises(UsageError, match=f"must be a torch.nn.Module, .* got {type(what).__name__}"):
        call(what)


def test_a_model_of_other_inputs_is_told_so() -> None:
    class OfTwo(Vit):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + other

    model = OfTwo(Usual()).eval()
    assert "does not run on one tensor of images of 3 x 32 x 32 (TypeError: " in refusal(model)


def documented(page: str, heading: str) -> str:
    """The Python block below a heading of a page."""
    text = (DOCS / page).read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    return text.partition("```python\n")[2].partition("```")[0]


def test_the_documented_way_to_give_an_own_class_both_names_works() -> None:
    model = vit(LikeVitPytorch, LikeVitPytorch)
    other = vit(LikeVitPytorch, LikeVitPytorch)
    without: Any = other.layers[1]
    images = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1))

    class Attention(LikeVitPytorch):
        """The class of the page, without any name of it in the tests' own classes."""

    for place in range(2):
        model.layers[place].__class__ = Attention
    exec(documented("heads.md", "An attention class of your own"), {"Attention": Attention, "model": model})
    report = headprobe.check(model, input_size=SIZE)
    assert report.passed, report.failures
    without.to_out[0].weight.data.zero_()
    with torch.inference_mode():
        with headprobe.ablate(model, "layer:1", input_size=SIZE):
            found = model(images)
        torch.testing.assert_close(found, other(images), atol=1e-6, rtol=1e-5)
        assert not torch.allclose(found, model(images), atol=1e-3)
