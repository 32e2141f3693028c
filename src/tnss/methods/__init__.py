"""Search methods by name."""

from tnss.methods.auto import Auto
from tnss.methods.base import Evaluation, Method, Proposal, View
from tnss.methods.greedy import Greedy
from tnss.methods.tnale import TnALE
from tnss.methods.tnga import TNGA
from tnss.methods.tnls import TNLS

METHODS = {"auto": Auto, "tnale": TnALE, "tnls": TNLS, "tnga": TNGA, "greedy": Greedy}

__all__ = ["METHODS", "TNGA", "TNLS", "Auto", "Evaluation", "Greedy", "Method", "Proposal", "TnALE", "View"]
