"""What to change so that a run fits: nothing is advised that the simulator has not tried."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from simgpu.catalog import CARDS, MAX_CARDS
from simgpu.fitting import Deployment, FitResult
from simgpu.workload import Workload

# Names of fields of a deployment or a workload, and their new values.
Changes = dict[str, object]


def what_fits(result: FitResult, report: Callable[[str], object] = print) -> Changes | None:
    """The first of ``candidates`` that was seen to fit, or None if none did.

    ``report`` is called with a few words before each is tried.
    """
    for changes in candidates(result):
        report(f"trying {', '.join(f'{name} {value}' for name, value in changes.items())}")
        deployment, workload = changed(*result.asked, changes)
        try:
            if deployment.fit(workload).fits:
                return changes
        except ValueError:  # so many ranks cannot share the model
            continue
    return None


def changed(
    deployment: Deployment, workload: Workload, changes: Changes
) -> tuple[Deployment, Workload]:
    """Both with the changes made that are theirs."""
    of_workload = {name: changes[name] for name in changes if hasattr(workload, name)}
    others = {name: changes[name] for name in changes if name not in of_workload}
    return replace(deployment, **others), replace(workload, **of_workload)


def cards_for_weights(deployment: Deployment) -> int:
    """How many cards like the first hold the weights, by division; what else a run needs is not
    counted."""
    card = deployment.cards[0]
    weights = deployment.weights_bytes({"": 0})[0]
    return math.ceil(weights / (card.total_bytes - card.context_bytes))


def _takes_float16(deployment: Deployment) -> bool:
    """Whether its weights can be quantised, if they are, in that data type."""
    try:
        replace(deployment, dtype="float16").quantiser  # noqa: B018
    except ValueError:
        return False
    return True


def candidates(result: FitResult) -> Iterator[Changes]:
    """What to try, least costly for the reader first; for a run that fits only a data type that
    suits the card better."""
    deployment, workload = result.asked
    cards, base = deployment.cards, {}
    native = all(card.bf16_supported for card in cards)
    if deployment.dtype == "bfloat16" and not native and _takes_float16(deployment):
        base = {"dtype": "float16"}
        yield base
    if result.fits:
        return
    if workload.train and not workload.gradient_checkpointing and result.oom.phase != "load":
        base = base | {"gradient_checkpointing": True}
        yield base
    if len(cards) > 1 and deployment.device_map != "auto":
        yield base | {"device_map": "auto"}
    ample = list(zip(result.needs, result.on_ample_cards, strict=True))
    # More cards do not share what one needs beside weights; the base may lower it.
    beside_weights = max(needs - device.weights_bytes for needs, device in ample)
    is_one_kind, card = isinstance(deployment.card, str), cards[0]
    if is_one_kind and (base or beside_weights < card.total_bytes):
        automatic = {"device_map": "auto"} if isinstance(deployment.device_map, dict) else {}
        in_dtype = replace(deployment, dtype=base.get("dtype", deployment.dtype))
        fewest = max(deployment.count + 1, cards_for_weights(in_dtype))
        for number in sorted({fewest, fewest + 1, 2 * fewest}):
            if number <= MAX_CARDS:
                yield base | automatic | {"count": number}
    by_size = sorted(CARDS.values(), key=lambda other: other.total_bytes)
    large = [one for one in by_size if one.total_bytes > max(result.needs)] if is_one_kind else []
    for other in large[:2]:
        yield {"card": other.key}
    if workload.batch_size > 1:
        # As many samples as fit if each needs the same beside the weights, and fewer.
        fits = min(
            workload.batch_size
            * (card.total_bytes - device.weights_bytes - card.outside_bytes)
            // max(1, needs - device.weights_bytes - card.outside_bytes)
            for card, (needs, device) in zip(cards, ample, strict=True)
        )
        sizes = {max(1, min(fits, workload.batch_size - 1) // parts) for parts in (1, 2, 4)} | {1}
        yield from (base | {"batch_size": size} for size in sorted(sizes, reverse=True))
