"""What ``gpdfx.torch_private`` relies on. Passes with PyTorch 2.11, 2.14 and 2.15."""

from __future__ import annotations

import ast
import contextlib
import inspect
import pickle
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gpdfx
from gpdfx import torch_private

aten = torch.ops.aten


class Pair(tuple):
    """No container of pytree's."""


class Halves(nn.Module):
    """Sizes that are symbols, expressions of symbols, numbers, and conditions on them."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] <= 50
        return x.unflatten(1, (2, x.shape[1] // 2)).sum(1)


@pytest.fixture(scope="module")
def graph() -> fx.Graph:
    auto = torch.export.Dim.AUTO
    inputs, free = (torch.randn(4, 6, 3),), {"x": {0: auto, 1: auto}}
    return torch.export.export(Halves(), inputs, dynamic_shapes=free, strict=False).graph


def value(graph: fx.Graph) -> Tensor:
    return graph.find_nodes(op="placeholder")[0].meta["val"]


# --------------------------------------------------------------------------- structures
TREE = {"b": [1, (2, 3)], "a": OrderedDict(c=4)}


def test_trees_are_flattened_and_put_together() -> None:
    leaves, spec = torch_private.tree_flatten(TREE)
    assert leaves == torch_private.tree_leaves(TREE) == [1, 2, 3, 4]
    assert isinstance(spec, torch_private.TreeSpec)
    assert spec.num_leaves == 4
    assert spec == torch_private.tree_flatten(torch_private.tree_map(str, TREE))[1]
    assert spec != torch_private.tree_flatten({"b": [1, [2, 3]], "a": OrderedDict(c=4)})[1]
    assert torch_private.tree_unflatten(leaves, spec) == TREE
    assert torch_private.tree_map(lambda x: 2 * x, (1, [2])) == (2, [4])


def test_what_pytree_does_not_know_is_a_leaf() -> None:
    assert torch_private.tree_leaves([Pair((1, 2))]) == [Pair((1, 2))]
    assert torch_private.tree_leaves({1, 2}) == [{1, 2}]
    size = torch.Size([3, 4])  # pytree knows it, and makes a tuple of it
    assert torch_private.tree_flatten([size])[0] == [size]
    assert [leaf for _, leaf in torch_private.tree_paths([size])] == [size]


def test_leaves_have_paths() -> None:
    (first, *_, last) = torch_private.tree_paths(((1, [2]), {"mask": 3}))
    assert [key.idx for key in first[0]] == [0, 0]
    assert last[1] == 3
    assert last[0][1].key == "mask"
    path = (*last[0], torch_private.attribute_key("sizes"))
    assert torch_private.key_text(path) == "[1]['mask'].sizes"
    assert torch_private.key_text((torch_private.item_key("mask"),)) == "['mask']"
    assert torch_private.key_text(()) == ""


# --------------------------------------------------------------------------- symbolic sizes
def test_symbolic_sizes_are_read(graph: fx.Graph) -> None:
    batch, length, width = value(graph).shape
    assert (torch_private.hint(batch), torch_private.hint(length)) == (4, 6)
    assert isinstance(batch, torch.SymInt)
    assert isinstance(width, int)
    assert torch_private.expression(batch).is_Symbol
    (symbol,) = torch_private.expression(length).free_symbols
    halved = torch_private.expression(length // 2)
    text = torch_private.python_text(halved)
    assert eval(text, {"math": None}, {str(symbol): 10}) == 5
    assert torch_private.expression(length - length).is_number


def test_a_size_that_depends_on_values_has_no_hint() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.nonzero()

    exported = torch.export.export(Chosen(), (torch.ones(3),), strict=False)
    (node,) = exported.graph.find_nodes(op="call_function", target=aten.nonzero.default)
    size = node.meta["val"].shape[0]
    assert torch_private.hint(size) is None
    torch_private.see(size, 3)
    assert [torch_private.hint(s) for s in (size, size * 2 + 1, size > 2)] == [3, 7, True]
    assert size.node.hint is None  # PyTorch's own guards do not know


def test_conditions_on_sizes_are_read(graph: fx.Graph) -> None:
    batch, length, _ = value(graph).shape
    conditions = torch_private.guards(length)
    assert all(isinstance(c, sympy.Basic) for c in conditions)
    (symbol,) = torch_private.expression(length).free_symbols
    assert any(isinstance(c, sympy.Eq) and symbol in c.free_symbols for c in conditions)
    assert any(c == sympy.Le(symbol, 50) for c in conditions)
    assert torch_private.guards(batch) == conditions  # of the environment, not of the size
    even = next(c for c in conditions if isinstance(c, sympy.Eq) and symbol in c.free_symbols)
    text = torch_private.python_text(even)
    assert [eval(text, {}, {str(symbol): n}) for n in (7, 8)] == [False, True]


# --------------------------------------------------------------------------- regions
def test_autocast_is_traced_to_the_functions_that_enter_and_leave_it() -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x @ x

    token = torch_private.enter_autocast("cpu", torch.bfloat16, True, False)
    assert torch.get_autocast_dtype("cpu") is torch.bfloat16
    assert torch.is_autocast_enabled("cpu")
    torch_private.exit_autocast(token)
    assert not torch.is_autocast_enabled("cpu")
    exported = torch.export.export(Cast(), (torch.ones(2, 2),), strict=False)
    region = torch.ops.higher_order.wrap_with_autocast
    (node,) = exported.graph.find_nodes(op="call_function", target=region)
    assert node.args[:3] == ("cpu", torch.bfloat16, True)  # enter_autocast's, in its order
    assert isinstance(node.args[3], bool)
    assert isinstance(node.args[4], fx.Node)


def test_gradients_stay_switched() -> None:
    before = torch.is_grad_enabled()
    try:
        for enabled in (False, True):
            torch_private.set_grad_enabled(enabled)
            assert torch.is_grad_enabled() is enabled
    finally:
        torch.set_grad_enabled(before)


def test_modes_are_switched_off() -> None:
    x = torch.ones(2, 2)
    with FlopCounterMode(display=False) as counter:
        x @ x
        seen = counter.get_total_flops()
        with torch_private.without_modes():
            x @ x
        assert counter.get_total_flops() == seen > 0


# --------------------------------------------------------------------------- tensors without data
def test_fake_tensors_are_known(graph: fx.Graph) -> None:
    assert torch_private.is_fake(value(graph))
    assert not torch_private.is_fake(torch.ones(1, device="meta"))


def test_fake_tensors_are_true_to_size_and_have_no_values() -> None:
    mode, p = torch_private.FakeMode(), nn.Parameter(torch.randn(4, 6))
    fake, view = mode.from_tensor(p), mode.from_tensor(p.detach()[1:])
    assert isinstance(fake, nn.Parameter)
    assert (fake.shape, fake.dtype, fake.device) == (p.shape, p.dtype, p.device)
    assert fake.requires_grad
    assert fake.untyped_storage().nbytes() == p.untyped_storage().nbytes() == 96
    assert torch_private.storage_key(fake) == torch_private.storage_key(view)
    with mode:
        y = fake @ torch.randn(6, 2) + torch.ones(2)
        z = torch.ones(3).add_(p.sum())
    assert torch_private.is_fake(y)
    assert torch_private.is_fake(z)
    assert y.shape == (4, 2)
    assert y.grad_fn is not None
    for ask in (Tensor.item, float, bool, Tensor.nonzero):
        with pytest.raises(RuntimeError), mode:
            ask(fake.detach().sum())


def test_operators_with_a_workspace_are_refused_where_it_has_no_size() -> None:
    lstm, x = nn.LSTM(4, 6), torch.randn(3, 2, 4)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        lstm(x)
    workspaces = [t for t in saved if t.dtype is torch.uint8]
    if not workspaces:
        pytest.skip("no oneDNN here")
    assert workspaces[0].numel() > 0
    with pytest.raises(NotImplementedError, match="rnn"), torch_private.FakeMode():
        lstm(x)


def test_function_modes_are_switched_off_and_on_again() -> None:
    with torch.device("meta"), torch.overrides.BaseTorchFunctionMode():
        with torch_private.without_function_modes():
            assert torch.ones(1).device.type == "cpu"
        assert torch.ones(1).device.type == "meta"
        assert torch._C._len_torch_function_stack() == 2


# --------------------------------------------------------------------------- memory
def test_storages_are_told_apart() -> None:
    x, y = torch.ones(4), torch.ones(4)
    assert torch_private.storage_key(x) == torch_private.storage_key(x[1:].view(3, 1))
    assert torch_private.storage_key(x) != torch_private.storage_key(y)


def test_a_reference_keeps_a_key_from_being_used_again() -> None:
    x = torch.ones(4)
    key, reference = torch_private.storage_key(x), torch_private.storage_reference(x)
    assert not reference.expired()
    del x
    assert reference.expired()
    others = [torch.ones(4) for _ in range(100)]
    assert key not in [torch_private.storage_key(other) for other in others]


def test_writes_are_counted() -> None:
    x = torch.ones(4)
    before = torch_private.version(x)
    x[:2].add_(1)  # through a view
    assert torch_private.version(x) == before + 1
    with torch.inference_mode():
        frozen = torch.ones(4)
    with pytest.raises(RuntimeError):
        torch_private.version(frozen)


# --------------------------------------------------------------------------- hooks
def test_hooks_of_a_parameter_are_listed() -> None:
    """Those of its gradient, and those after it; each is gone once it is removed."""
    p, first, second = nn.Parameter(torch.ones(2)), list[Tensor](), list[Tensor]()
    assert torch_private.gradient_hooks(p) == torch_private.accumulation_hooks(p) == []
    one = p.register_hook(first.append)
    other = p.register_post_accumulate_grad_hook(second.append)
    assert torch_private.gradient_hooks(p) == [first.append]
    assert torch_private.accumulation_hooks(p) == [second.append]
    one.remove(), other.remove()
    assert torch_private.gradient_hooks(p) == torch_private.accumulation_hooks(p) == []


# --------------------------------------------------------------------------- kinds
def test_norms_have_one_base() -> None:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm2d)
    assert all(issubclass(kind, torch_private.NORMS) for kind in kinds)
    assert not issubclass(nn.LayerNorm, torch_private.NORMS)
    batch = nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d
    assert all(issubclass(kind, torch_private.BATCH_NORMS) for kind in batch)
    assert not issubclass(nn.InstanceNorm2d, torch_private.BATCH_NORMS)
    buffers = dict(nn.BatchNorm2d(3).named_buffers())
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]


def test_fused_attention_has_a_switch() -> None:
    """With it on, an encoder in eval mode goes past its layers; the hook shows the difference."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net, x, seen = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 3, 8), list[int]()
    mask = torch.tensor([[False, False, False], [False, False, True]])
    net.layers[1].linear1.forward = lambda y: (
        seen.append(1)
        or nn.Linear.forward(  # type: ignore
            net.layers[1].linear1, y
        )
    )
    for fused in (True, False):
        for part in net.modules() if not fused else ():
            for kind, switch in torch_private.FUSED.items():
                if isinstance(part, kind):
                    assert getattr(part, switch)
                    setattr(part, switch, False)
        with torch.no_grad():
            net(x, src_key_padding_mask=mask)
        assert bool(seen) is not fused


def test_compiled_modules_and_errors_are_known() -> None:
    net = nn.Linear(2, 2)
    assert torch_private.is_compiled(torch.compile(net))
    assert not torch_private.is_compiled(net)

    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(torch_private.compile_error()):
        torch.compile(breaks, fullgraph=True, backend="eager")(torch.ones(1))


def test_operators_are_told_apart() -> None:
    assert torch_private.is_packet(aten.add)
    assert torch_private.is_overload(aten.add.Tensor)
    assert not torch_private.is_packet(aten.add.Tensor)
    assert not torch_private.is_overload(torch.add)
    assert torch_private.op_name(aten.add.Tensor) == "add"
    assert torch_private.custom_overload(aten.add) is aten.add


def test_paths_to_operators_end_in_what_is_called() -> None:
    assert all(map(torch_private.holds_ops, (torch.ops, torch.ops.aten, aten.add)))
    assert not any(map(torch_private.holds_ops, (torch, aten.add.Tensor)))
    assert torch_private.is_higher_order(torch.ops.higher_order.cond)
    assert not torch_private.is_higher_order(aten.add.Tensor)


def test_a_whole_call_is_not_looked_into() -> None:
    """By the tracer that unpickles a graph."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = torch_private.call_whole(graph, OrderedDict, (), {"a": x, "b": 2})
    graph.output(made)
    again = pickle.loads(pickle.dumps(fx.GraphModule(nn.Module(), graph)))
    (call,) = again.graph.find_nodes(op="call_function", target=OrderedDict)
    assert call.kwargs["b"] == 2
    assert again(torch.ones(1)) == OrderedDict(a=torch.ones(1), b=2)


def test_custom_operators_give_their_overload() -> None:
    @torch.library.custom_op("gpdfx_tests::doubled", mutates_args=())
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    overload = torch_private.custom_overload(doubled)
    assert overload is torch.ops.gpdfx_tests.doubled.default
    assert torch_private.is_overload(overload)


def test_the_room_stands_alone() -> None:
    text = Path(gpdfx.torch_private.__file__).read_text()
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert all(not n.level for n in nodes if isinstance(n, ast.ImportFrom))
    assert "gpdfx" not in {a.name.partition(".")[0] for n in nodes for a in n.names}


def test_a_constant_result_is_no_part_of_a_compiled_graph() -> None:
    made = torch_private.constant_result(lambda: torch.arange(3))
    marked = torch.compiler.assume_constant_result(lambda: torch.arange(3))
    assert vars(made) == vars(marked) == {"_dynamo_marked_constant": True}


def test_a_counter_without_modules_counts_all_the_same() -> None:
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(3, 4)
    counter = torch_private.flop_counter()
    with counter:
        y = net(x.requires_grad_())
        torch.autograd.grad(y.sum(), x)
    assert counter.get_total_flops() == 2 * 2 * 3 * (4 * 6 + 6 * 2)


# --------------------------------------------------------------------------- calls that are seen
class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Same.apply(x) * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def test_functions_are_seen_in_this_thread_alone() -> None:
    """Not those inside a handler; afterwards all is as it was."""
    seen, x = [], torch.ones(2)
    before = torch.autograd.Function.__dict__["apply"]

    def handle(kind: Any, args: Any, kwargs: Any) -> Any:
        seen.append(kind)
        return kind.apply(*args, **kwargs)

    with torch_private.functions(handle):
        assert torch.equal(Twice.apply(x), 2 * x)
        other = threading.Thread(target=Same.apply, args=(x,))
        other.start()
        other.join()
    assert seen == [Twice]
    assert torch.autograd.Function.__dict__["apply"] is before


def test_the_kernel_of_an_operator_is_not_traced() -> None:
    seen = []

    @torch.library.custom_op("gpdfx_tests::tripled", mutates_args=())
    def tripled(x: Tensor) -> Tensor:
        return x * 3

    tripled.register_fake(torch.empty_like)
    tripled.register_autograd(lambda ctx, g: g * 3)

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return tripled(Same.apply(super().forward(x)))

    def handle(kind: Any, args: Any, kwargs: Any) -> Any:
        seen.append((kind is Same, torch_private.is_traced()))
        return kind.apply(*args, **kwargs)

    with torch_private.functions(handle):
        torch.export.export(Net(2, 2), (torch.ones(3, 2),))
    assert set(seen) == {(True, True), (False, False)}
    assert not torch_private.is_traced()


@pytest.mark.parametrize("new", [False, True])
def test_functions_are_met_by_other_names(new: bool) -> None:
    class Old(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, by: int = 3) -> Tensor:
            return x * by

    class New(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, by: int = 3) -> Tensor:  # type: ignore[override]
            return x * by

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            seen.append("context")

    class Child(New if new else Old):  # type: ignore[misc]
        """It inherits both."""

    seen = list[Any]()

    def handle(kind: Any, args: Any, kwargs: Any) -> Any:
        seen.append((kind, args))
        return args[0] * 5

    x, alias, own = torch.ones(()), Child.apply, Child.forward
    with torch_private.aliases():
        assert alias(x, 2) == 2  # no handler
        seen.clear()
        with torch_private.functions(handle):
            assert alias(x, 2) == 5
    assert seen == [(Child, (x, 2))]
    told = list[Any]()
    with (
        torch_private.aliases(lambda *call: told.append(call)),
        torch_private.functions(lambda kind, args, _: kind.apply(*args)),
    ):
        assert alias(x, 2) == Child.apply(x, 2) == 2
    assert told == [(Child, (x, 2))]
    del seen[1:]
    assert Child.forward is own
    assert "forward" not in vars(Child)
    assert alias(x, 2) == 2
    assert seen[1:] == ["context"] * new


def test_numbers_of_tensors_without_data_are_of_no_concern_to_a_graph() -> None:
    library = torch.library.Library("gpdfx_test", "DEF")
    library.define("half(Tensor x) -> Tensor")

    def half(x: Tensor) -> Tensor:
        with torch_private.own_numbers([x]):
            return x.clamp(max=x.max().item() / 2)

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.gpdfx_test.half(x)

    torch.library.register_fake("gpdfx_test::half", half, lib=library)
    exported = torch.export.export(Net(), (torch.ones(3, 2),), strict=False)
    assert [n.op for n in exported.graph.nodes] == ["placeholder", "call_function", "output"]
    torch.testing.assert_close(half(torch.ones(3)), torch.full((3,), 0.5))  # none of these


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_ask_the_handler_of_their_thread(reentrant: bool) -> None:
    layer, x = nn.Linear(2, 3), torch.ones(4, 2, requires_grad=True)
    runs: list[str] = []

    class Handler(torch_private.Checkpoints):
        def again(self, function: Any) -> Any:
            def counted(*args: Any) -> Any:
                runs.append("again")
                return function(*args)

            runs.append("asked")
            return counted

    with torch_private.checkpoints(Handler()):
        y = checkpoint(layer, x, use_reentrant=reentrant)
    assert runs == ["asked"]
    gradients = torch.autograd.grad(y.sum(), (x, layer.weight))
    assert runs == ["asked", "again"]
    layer(x).sum().backward()
    torch.testing.assert_close(gradients, (x.grad, layer.weight.grad))
    checkpoint(layer, x, use_reentrant=reentrant)  # no handler any more
    assert runs == ["asked", "again"]


def test_regions_take_the_place_of_checkpoints() -> None:
    layer, x, seen = nn.Linear(2, 3), torch.ones(4, 2, requires_grad=True), list[Any]()

    class Handler(torch_private.Checkpoints):
        @contextlib.contextmanager
        def region(self, reentrant: bool, preserve: bool, args: Any) -> Iterator[None]:
            seen.append((reentrant, preserve, args))
            yield
            seen.append("left")

    with torch_private.checkpoints(Handler()):
        for reentrant in (False, True):
            y = checkpoint(layer, x, use_reentrant=reentrant, preserve_rng_state=reentrant)
            assert torch.equal(y, layer(x))
    assert seen == [(False, False, (x,)), "left", (True, True, (x,)), "left"]


def test_steps_that_learn_have_gradients() -> None:
    x = torch.tensor([[0.32, 5.0], [-0.28, -9.0]], requires_grad=True)
    for function, size, rest in zip(torch_private.LEARNED_STEPS, (1, 2), ((), (0,)), strict=True):
        scale, zero = torch.full((size,), 0.1, requires_grad=True), torch.zeros(size)
        y = function(x, scale, zero, *rest, -8, 7, 0.5)
        torch.testing.assert_close(y, torch.tensor([[0.3, 0.7], [-0.3, -0.8]]))
        of_x, of_scale = torch.autograd.grad(y.sum(), (x, scale))
        assert of_x.tolist() == [[1, 0], [1, 0]]
        rows = torch.tensor([3 - 3.2 + 7, -3 + 2.8 - 8]) / 2  # half, as the last argument says
        torch.testing.assert_close(of_scale, rows.sum(0, keepdim=True) if size == 1 else rows)


def test_hooks_are_taken_from_a_module() -> None:
    layer, x = nn.Linear(2, 3), torch.ones(4, 2)
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
    )
    layer.register_forward_hook(lambda module, args, y: y + 1)
    wanted, hooked = layer(x), torch_private.take_hooks(layer)
    torch.testing.assert_close(hooked(x), wanted)
    layer._parameters["bias"] = nn.Parameter(layer.bias + 1)  # the registries are one
    torch.testing.assert_close(hooked(x), wanted + 1)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch_private.take_hooks(layer) == layer.forward


def test_vmap_is_functions_in_an_export_and_none_when_decomposed() -> None:
    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.vmap(lambda row: row * row.sum())(x)

    export = torch.export.export(Mapped(), (torch.randn(3, 4),))
    assert any(map(torch_private.is_vmap, export.graph.nodes))
    assert not all(map(torch_private.is_vmap, export.graph.nodes))
    assert not any(map(torch_private.is_vmap, export.run_decompositions({}).graph.nodes))


def test_a_mapped_dimension_is_moved_in_the_trace() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Any:
            with torch_private.Mapped():
                return torch.vmap(lambda row: self.weight @ row)(x)

    model, x = Columns(), torch.randn(4, 3)
    export = torch.export.export(model, (x,), strict=False).run_decompositions({})
    torch.testing.assert_close(export.module()(x), x @ model.weight.T)
    assert not export.constants


def test_transforms_are_told() -> None:
    told = list[bool]()
    torch.vmap(lambda x: (told.append(torch_private.in_transform()), x)[1])(torch.ones(2))
    assert told == [True]
    assert not torch_private.in_transform()


def test_a_tensor_without_data_may_have_a_known_value() -> None:
    three = torch.tensor(3)

    class Viewed(nn.Module):
        def forward(self, x: Tensor) -> Any:
            n: Any = torch.arange(3).sum()
            with torch_private.known_values([(n, three)]):
                return x.view(n, 2)

    export = torch.export.export(Viewed(), (torch.ones(6),), strict=False)
    (y,) = export.graph.output_node().args[0]  # type: ignore[misc, union-attr]
    assert y.meta["val"].shape == (3, 2)  # type: ignore[union-attr]


def test_a_composite_is_the_calls_that_it_makes() -> None:
    aten = torch.ops.aten
    assert torch_private.is_composite(aten.tensordot.default)
    for op in (aten.mm.default, aten.sym_size.int, torch.add):
        assert not torch_private.is_composite(op)
    assert torch_private.is_composite(aten.cosine_embedding_loss.default)
    assert not torch_private.is_composite(aten.cosine_embedding_loss.default, autocast=True)
    assert {"tensordot", "mm"} <= set(torch_private.aten_names())

    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.tensordot(x, y, ([1], [1]))

    export = torch.export.export(Product(), (torch.randn(3, 4), torch.randn(5, 4)))
    (node,) = export.graph.find_nodes(op="call_function", target=aten.tensordot.default)
    values = [node.args[0].meta["val"], torch.randn(5, 4)]
    arguments = lambda given: ((*given, *node.args[2:]), {})  # noqa: E731
    made = torch_private.composed(node.target, arguments, values)
    calls = [n.target for n in made.nodes if n.op == "call_function"]
    assert aten.mm.default in calls
    assert node.target not in calls
    x, y = torch.randn(3, 4), torch.randn(5, 4)
    torch.testing.assert_close(torch.fx.GraphModule({}, made)(x, y), x @ y.T)


# --------------------------------------------------------------------------- several processes
def test_hooks_of_fully_shard_gather_and_reduce() -> None:
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
        want = net[0].weight.detach().clone()
        fully_shard(net[0]), fully_shard(net)
        calls: list[int] = []
        net.register_forward_hook(lambda *_: calls.append(1))
        assert torch_private.sharding_hooks(net[1]) == ([], [])
        (before,), (after,) = torch_private.sharding_hooks(net)  # the root
        (before_0,), (after_0,) = torch_private.sharding_hooks(net[0])
        assert not torch_private.in_sharded_forward(net[0])
        args, _ = before(net, (torch.ones(1, 4),), {})
        assert torch_private.in_sharded_forward(net[0])
        args, _ = before_0(net[0], args, {})
        assert torch.equal(net[0].weight, want)
        assert type(net[0].weight) is nn.Parameter
        result = after(net, args, after_0(net[0], args, args[0] @ net[0].weight.T))
        assert not torch_private.in_sharded_forward(net[0])
        result.sum().backward()
        assert torch.equal(net[0].weight.grad.full_tensor(), torch.ones(3, 4))
        assert not calls
    finally:
        torch.distributed.destroy_process_group()


def test_synchronized_batch_norm_is_local_for_a_while() -> None:
    norm, x = nn.SyncBatchNorm(3), torch.randn(4, 3)
    own = nn.SyncBatchNorm.forward
    assert not torch_private.norms_are_local()
    with torch_private.local_norms():
        with torch_private.local_norms():
            pass
        assert torch_private.norms_are_local()
        torch.testing.assert_close(norm(x), nn.BatchNorm1d(3)(x))
    assert nn.SyncBatchNorm.forward is own
    assert not torch_private.can_synchronize(x)
    names = [*inspect.signature(nn.modules.batchnorm.sync_batch_norm.forward).parameters][1:]
    numbers = ["running_mean", "running_var", "eps", "momentum", "process_group", "world_size"]
    assert names == ["input", "weight", "bias", *numbers]


def test_to_empty_is_known_by_its_name() -> None:
    seen = []

    class Watched(nn.Module):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            seen.append(torch_private.drops_values(fn))
            return super()._apply(fn, recurse)

    Watched().to_empty(device="cpu").to("cpu").double()
    assert seen == [True, False, False]


def test_only_exports_are_exports() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + int(torch_private.is_exporting())

    net, x = Net(), torch.zeros(1)
    exported = [torch.export.export(net, (x,), strict=strict).module() for strict in (True, False)]
    exported += [torch.jit.trace(net, (x,), check_trace=False)]
    assert [int(made(x)) for made in exported] == [1, 1, 1]
    assert [int(made(x)) for made in (net, torch.compile(net, backend="eager"))] == [0, 0]
