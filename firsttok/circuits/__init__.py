"""Who detects, writes, takes down and reads the first token's anomaly, in any decoder."""

from firsttok.circuits.anatomy import Act, Carrier, Head, LayerState, Neuron, Step
from firsttok.circuits.causes import KnockOut, Masked, Needed, Origin
from firsttok.circuits.circuit import ActCircuit, Brief, Circuit, EditLayer, brief, circuit

__all__ = [
    "Act",
    "ActCircuit",
    "Brief",
    "Carrier",
    "Circuit",
    "EditLayer",
    "Head",
    "KnockOut",
    "LayerState",
    "Masked",
    "Needed",
    "Neuron",
    "Origin",
    "Step",
    "brief",
    "circuit",
]
