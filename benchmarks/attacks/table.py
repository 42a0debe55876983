"""All attacks, by name."""

from benchmarks.attacks.calls import CALLS
from benchmarks.attacks.connections import CONNECTIONS
from benchmarks.attacks.floods import FLOODS
from benchmarks.attacks.header_blocks import HEADER_BLOCKS
from benchmarks.attacks.link import Attack
from benchmarks.attacks.metrics import METRICS
from benchmarks.attacks.pictures import PICTURES
from benchmarks.attacks.resets import RESETS
from benchmarks.attacks.small_parts import SMALL_PARTS
from benchmarks.attacks.streams import STREAMS
from benchmarks.attacks.web import WEB

ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        *RESETS,
        *HEADER_BLOCKS,
        *FLOODS,
        *CALLS,
        *STREAMS,
        *PICTURES,
        *CONNECTIONS,
        *WEB,
        *METRICS,
        *SMALL_PARTS,
    )
}
