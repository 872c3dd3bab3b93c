"""The algorithm, written once and without I/O: yields ready calls, is sent their results."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from time import perf_counter as clock
from typing import Any, cast

from wg_core.errors import (
    AbortRun,
    BudgetExceededError,
    MissingInputError,
    NodeExecutionError,
    PortValueError,
    RunTimeoutError,
    WGError,
)
from wg_core.execution.block import check_kinds, check_outputs
from wg_core.execution.context import Frame, check_stop
from wg_core.execution.plan import Call, LoopStart, Placeholder, Plan, steps_of
from wg_core.execution.tensors import map_tensors
from wg_core.structure.port import UNSET, kind_of

Walk = Generator[tuple[Call, dict[str, Any]], dict[str, Any], None]


def walk(plan: Plan, values: list[Any], frame: Frame) -> Walk:
    """Run `plan` over `values`: yields `(call, inputs)` and is sent the outputs; results stay in `values`.

    Raises: NodeExecutionError for what a node raises (thrown in by the driver), OutputContractError,
    MissingInputError, AbortRun, RunTimeoutError.
    """
    options = frame.options
    rounds: dict[int, int] = {}
    for loop in plan.loops:
        steps: Any = steps_of(loop, options.num_loop_steps)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise PortValueError(
                f"{frame.path}: loop {loop.loop_id!r} needs a whole number of steps >= 1, not {steps!r}"
            )
        values[loop.total_slot] = steps
        rounds[id(loop)] = 2 if options.dry_run else loop.iterations(steps) if loop.iterations else steps
    watched, starts, ends = frame.watched, frame.starts, frame.ends
    iteration = 0
    total = 0
    started = 0.0
    program = cast("list[Any]", plan.program)
    op: Any = program[0] if program else None
    while op is not None:
        if op.__class__ is Call:
            inputs: dict[str, Any] = {}
            for port, slot in op.sure:
                inputs[port] = values[slot]
            if op.special:
                _gather(op, values, inputs, frame)
            frame.node_id = op.node_id
            if watched:
                if frame.checked:
                    _check_inputs(op, inputs, frame)
                if starts is not None:
                    starts(op.node_id, frame.iteration, total or None, inputs)
                started = clock()
            try:
                outputs = yield op, inputs
            except (AbortRun, RunTimeoutError, BudgetExceededError, NodeExecutionError):
                raise
            except Exception as error:
                raise _failure(op, inputs, frame, error, started) from error
            try:
                for port, slot in op.outs:
                    values[slot] = outputs[port]
                if len(outputs) != op.sure_outs:
                    check_outputs(f"{frame.path}/{op.node_id}", op.ports.outputs, outputs)
                    for port, slot in op.optional_outs:
                        values[slot] = outputs.get(port, UNSET)
            except (KeyError, TypeError, AttributeError):
                check_outputs(f"{frame.path}/{op.node_id}", op.ports.outputs, outputs)
                raise
            if watched:
                elapsed = clock() - started
                if frame.checked:
                    _check_outputs(op, outputs, frame)
                if ends is not None:
                    ends(op.node_id, frame.iteration, total or None, inputs, outputs, elapsed)
            for slot in op.free:
                values[slot] = None
            op = op.then
        elif op.__class__ is LoopStart:
            loop = op.loop
            iteration = 0
            total = rounds[id(loop)]
            values[loop.index_slot] = 0
            for slot, resolve in loop.seeds:
                values[slot] = resolve(values)
            for slot in loop.seed_free:
                values[slot] = None
            frame.iteration = 0
            if watched:
                check_stop(frame)
                frame.emit("loop_start", num_steps=total, data={"loop": loop.loop_id})
            op = op.then
        else:
            loop = op.loop
            if watched:
                check_stop(frame)
                frame.emit("loop_iteration", iteration=iteration, num_steps=total, data={"loop": loop.loop_id})
            iteration += 1
            until = loop.until_slot
            if iteration < total and (until is None or options.dry_run or not values[until]):
                for source, slot in loop.carries:  # a carry has a slot of its own, so their order does not matter
                    values[slot] = values[source]
                if loop.grad_steps is not None and iteration <= total - loop.grad_steps:
                    for _, slot in loop.carries:  # gradients end here: only the last iterations learn from each other
                        values[slot] = map_tensors(values[slot], lambda tensor: tensor.detach())
                values[loop.index_slot] = iteration
                frame.iteration = iteration
                op = program[loop.start]
            else:
                for slot in loop.free:
                    values[slot] = None
                frame.iteration = None
                if watched:
                    frame.emit("loop_end", iteration=iteration - 1, num_steps=total, data={"loop": loop.loop_id})
                total = 0
                op = op.then
    frame.node_id = None


def _gather(op: Call, values: list[Any], inputs: dict[str, Any], frame: Frame) -> None:
    for port, resolve, required in op.special:
        try:
            value = resolve(values)
        except PortValueError as error:
            raise PortValueError(f"{frame.path}/{op.node_id}: {error}") from error
        if value is not UNSET:
            inputs[port] = value
        elif required:
            raise MissingInputError(
                f"{frame.path}/{op.node_id}.{port} is required, but the optional output that feeds it was not set; "
                f"give the node a default: add_node(..., defaults={{{port!r}: ...}})"
            )


def _check_inputs(op: Call, inputs: dict[str, Any], frame: Frame) -> None:
    if frame.stoppable:
        check_stop(frame)
    if frame.options.strict_types:
        given = {k: v for k, v in inputs.items() if not isinstance(v, Placeholder)}
        check_kinds(f"{frame.path}/{op.node_id}", op.ports.inputs, given)


def _check_outputs(op: Call, outputs: dict[str, Any], frame: Frame) -> None:
    options = frame.options
    if options.strict_types:
        given = {k: v for k, v in outputs.items() if not isinstance(v, Placeholder)}
        check_kinds(f"{frame.path}/{op.node_id}", op.ports.outputs, given)
    if options.guard_nan:
        for port, value in outputs.items():
            if _has_nan(value):
                at = "" if frame.iteration is None else f" in iteration {frame.iteration}"
                raise PortValueError(f"{frame.path}/{op.node_id}.{port}{at} is not finite: {kind_of(value)}")
    if options.capture:
        for port, value in outputs.items():
            frame.root.captured[f"{frame.node_path}{op.node_id}:{port}"] = value


def _has_nan(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, Mapping):
        return any(_has_nan(v) for v in cast("Mapping[Any, Any]", value).values())
    if isinstance(value, (list, tuple)):
        return any(_has_nan(v) for v in cast("list[Any]", value))
    total = getattr(value, "sum", None)
    if total is None or not hasattr(value, "dtype"):
        return False
    plain = value.detach() if hasattr(value, "detach") else value
    return not math.isfinite(float(abs(plain).sum()))


def _failure(op: Call, inputs: Mapping[str, Any], frame: Frame, error: Exception, started: float) -> WGError:
    frame.emit(
        "node_error",
        node_id=op.node_id,
        iteration=frame.iteration,
        inputs=inputs,
        elapsed=clock() - started if started else None,
        data={"error": f"{type(error).__name__}: {error}"},
    )
    at = "" if frame.iteration is None else f" in iteration {frame.iteration}"
    kinds = ", ".join(f"{k}: {kind_of(v)}" for k, v in inputs.items()) or "no inputs"
    return NodeExecutionError(
        f"{frame.path}/{op.node_id} failed{at}: {type(error).__name__}: {error} (inputs: {kinds})"
    )
