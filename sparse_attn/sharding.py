"""Arrays split over devices: every device works on its own batch rows and heads, and nothing is communicated.

How depends on the kind of the mesh's axes. *Explicit* axes are part of the arrays' types, so a public function goes
through `over_explicit_axes`, a `jax.shard_map` of the whole call. *Auto* axes are known to XLA's partitioner alone,
after tracing; it cannot cut a loop over rows and heads, so such a loop goes through `over_auto_axes`, which tells it
that rows and heads are independent. Inside a user's own `jax.shard_map` (*manual* axes) arrays are local already;
loops there only have to start from values of the right type, see `vary_alike`.

Axes are named by a letter each: "b" for batch rows, "h" for query heads, "k" for key/value heads, "." for an axis that
every device needs whole; axes left out at the end are such too. So query is "b.h" and key "b.k".
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_Self = TypeVar("_Self")
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_Method = Callable[Concatenate[_Self, _Parameters], _Result]


def vary_alike(tree: Any, *like: Any) -> Any:
    """The arrays of tree, marked as varying over every mesh axis over which they or those of `like` vary.

    Inside `jax.shard_map` the type of an array says over which axes its values differ between devices, and a loop must
    end with the types it began with; constants vary over none. Elsewhere this does nothing.
    """
    axes = frozenset[str]().union(*(varying(leaf) for leaf in jax.tree.leaves((tree, like))))

    def vary(array: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(vary, tree)


def over_auto_axes(function: Callable[..., Any], operands: tuple, in_axes: Any, out_axes: Any, *, group: int) -> Any:
    """function(*operands), which every device calls for its own rows and heads where XLA splits them.

    Not differentiable.

    Args:
      function: of pytrees of arrays to a pytree of arrays, for any number of rows and heads.
      operands: what it takes. Each array has an axis "b", and no "h" or "k" before it.
      in_axes: the axes of the operands as words, a pytree that is a prefix of them.
      out_axes: the same for the results.
      group: query heads of one key/value head; "h" is cut into ("k", group), so that heads stay with their keys.
    """
    leaves, operands_tree = jax.tree.flatten(operands)
    words = _words(in_axes, operands)
    cut_words = [word.replace("h", "k.") for word in words]
    result_words: list[str] = []
    results_tree = None

    def cut(array: jax.Array, word: str) -> jax.Array:
        axis = word.find("h")
        return array if axis < 0 else array.reshape(*array.shape[:axis], -1, group, *array.shape[axis + 1 :])

    def join(array: jax.Array, word: str) -> jax.Array:
        axis = word.find("h")
        return array if axis < 0 else array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])

    def call_flat(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        nonlocal results_tree
        with own_promotion():
            results = function(*jax.tree.unflatten(operands_tree, map(join, leaves, words)))
        result_words[:], results_tree = _words(out_axes, results), jax.tree.structure(results)
        return tuple(map(cut, jax.tree.leaves(results), result_words))

    def cut_result_words() -> list[str]:
        return [word.replace("h", "k.") for word in result_words]

    def rule(mesh: jax.sharding.Mesh, operand_types: list, result_types: list) -> str:
        """The axes as Shardy reads them: "b" and "k" are common to all arrays, every other axis stands for itself."""
        del mesh
        sides = []
        for index, (word, kind) in enumerate(
            zip([*cut_words, *cut_result_words()], [*operand_types, *result_types], strict=True)
        ):
            letters = word.ljust(kind.rank, ".")
            sides.append(" ".join(c if c in "bk" else f"x{index}_{axis}" for axis, c in enumerate(letters)))
        return f"{', '.join(sides[: len(words)])} -> {', '.join(sides[len(words) :])}"

    def partition(mesh: jax.sharding.Mesh, operands: tuple, results: tuple) -> tuple:
        del results
        axes = {".": None, "b": None, "k": None}
        for word, operand in zip(cut_words, operands, strict=True):
            axes |= {c: axis for c, axis in zip(word, operand.sharding.spec, strict=False) if c in "bk" and axis}

        def shard(word: str) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(axes[letter] for letter in word)))

        return mesh, call_flat, tuple(map(shard, cut_result_words())), tuple(map(shard, cut_words))

    partitioned = custom_partitioning(call_flat)
    partitioned.def_partition(partition, sharding_rule=rule)

    @jax.custom_batching.custom_vmap
    def call(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(partitioned(*leaves))

    @call.def_vmap
    def call_batched(axis_size: int, in_batched: list[bool], *leaves: jax.Array) -> tuple[tuple, tuple]:
        """What vmap adds becomes more rows."""

        def merge(leaf: jax.Array, is_batched: bool, word: str) -> jax.Array:
            axis = word.index("b")
            leaf = leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
            leaf = jnp.moveaxis(leaf, 0, axis)
            return leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 2 :])

        def unmerge(leaf: jax.Array, word: str) -> jax.Array:
            axis = word.index("b")
            leaf = leaf.reshape(*leaf.shape[:axis], axis_size, -1, *leaf.shape[axis + 1 :])
            return jnp.moveaxis(leaf, axis, 0)

        results = tuple(map(unmerge, call(*map(merge, leaves, in_batched, words)), result_words))
        return results, (True,) * len(results)

    results = call(*map(cut, leaves, words))
    return jax.tree.unflatten(results_tree, map(join, results, result_words))


def over_explicit_axes(function: Callable[..., Any], operands: tuple, in_axes: Any, out_axes: Any) -> Any:
    """function(*operands) inside `jax.shard_map` over the Explicit axes of the operands' mesh, if it has any.

    Rows are split as those of the first operand. Heads are split as those of the first that has an axis "k", the key:
    query head h belongs to key head h // (heads / kv_heads), so that both must be cut at the same places. Operands that
    are split otherwise are brought there first.

    Args:
      function: of pytrees of arrays to a pytree of arrays, for any number of rows and heads.
      operands: what it takes, first one with an axis "b".
      in_axes: the axes of the operands as words, a pytree that is a prefix of them.
      out_axes: the same for the results.
    """
    leaves, tree = jax.tree.flatten(operands)
    words = _words(in_axes, operands)
    mesh = jax.typeof(leaves[0]).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        with own_promotion():
            return function(*operands)

    split: dict[str, Any] = {"b": None, "h": None, "k": None}
    for letter, first in (("b", "b"), ("k", "k"), ("h", "k")):
        index = next((index for index, word in enumerate(words) if first in word), None)
        if index is not None:
            split[letter] = _axis_of(leaves[index], words[index].index(first))
            if letter == "h" and "h" in words[0] and leaves[index].shape[words[index].index("k")] == 1:
                split["h"] = _axis_of(leaves[0], words[0].index("h"))  # every query head reads the only key head

    def spec(word: str) -> PartitionSpec:
        return PartitionSpec(*(split.get(letter) for letter in word))

    def reshard(array: jax.Array, word: str) -> jax.Array:
        whole = spec(word.ljust(array.ndim, "."))
        return array if jax.typeof(array).sharding.spec == whole else jax.sharding.reshard(array, whole)

    def call_locally(*leaves: jax.Array) -> Any:
        with own_promotion():
            return function(*jax.tree.unflatten(tree, leaves))

    call = jax.shard_map(
        call_locally,
        mesh=mesh,
        in_specs=tuple(map(spec, words)),
        out_specs=jax.tree.map(spec, out_axes),
    )
    return call(*map(reshard, leaves, words))


def splits_over_mesh(
    out_axes: Any = "b.h", *, whole: Callable[[Any], str] = lambda self: "", **axes: Any
) -> Callable[[_Method[_Self, _Parameters, _Result]], _Method[_Self, _Parameters, _Result]]:
    """Decorator: the method runs on arrays that Explicit mesh axes split, through `over_explicit_axes`.

    Args:
      out_axes: the axes of its results as words, a pytree that is a prefix of them.
      whole: from self, letters of axes that no device may have a part of, since rows or heads are not independent.
      axes: of each argument that holds arrays, as words; query, key and value are known.
    """
    axes = {"query": "b.h", "key": "b.k", "value": "b.k"} | axes

    def decorate(method: _Method[_Self, _Parameters, _Result]) -> _Method[_Self, _Parameters, _Result]:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def call(self: _Self, /, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
            mesh = jax.sharding.get_abstract_mesh()
            if AxisType.Explicit not in mesh.axis_types:
                with own_promotion():
                    return method(self, *args, **kwargs)
            bound = signature.bind(self, *args, **kwargs)
            names = [name for name in bound.arguments if name in axes]
            operands = tuple(bound.arguments[name] for name in names)
            letters = whole(self)
            letters += "hk" if "h" in letters else ""
            cut = str.maketrans(letters, "." * len(letters))
            in_axes, results = jax.tree.map(
                lambda word: word.translate(cut), (tuple(axes[name] for name in names), out_axes)
            )

            def call_locally(*operands: Any) -> Any:
                bound.arguments.update(zip(names, operands, strict=True))
                return method(*bound.args, **bound.kwargs)

            return over_explicit_axes(call_locally, operands, in_axes, results)

        return call

    return decorate


def put_on_mesh(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The array split as spec says over the mesh of `jax.set_mesh`; as it is where the axes are manual.

    Raises:
      ValueError: the size of a mesh axis does not divide the axis that it is to split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    for axis, size in zip(spec, array.shape, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(f"mesh axis {axis!r} of size {mesh.shape[axis]} must divide the {size} it is to split")
    if AxisType.Auto in mesh.axis_types:
        return jax.lax.with_sharding_constraint(array, spec)
    return array if explicit_sharding(array) is None else jax.sharding.reshard(array, spec)


def explicit_sharding(array: jax.Array) -> NamedSharding | None:
    """How Explicit axes of a mesh split an array, by its type; None where there are none."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


@contextlib.contextmanager
def own_promotion() -> Iterator[None]:
    """JAX's ordinary promotion of dtypes and ranks, whatever the caller is strict about in code of its own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _axis_of(array: jax.Array, place: int) -> Any:
    """The mesh axes along one axis of an array, by its type."""
    spec = jax.typeof(array).sharding.spec
    return spec[place] if place < len(spec) else None


def _words(prefix: Any, tree: Any) -> list[str]:
    """The word of every leaf of tree, given a prefix of it."""
    return jax.tree.leaves(jax.tree.map(lambda word, part: jax.tree.map(lambda _: word, part), prefix, tree))


def varying(array: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which an array varies."""
    return jax.typeof(array).manual_axis_type.varying
