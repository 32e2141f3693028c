"""Tensor-network structure search with TnALE (arXiv 2304.12875).

Given a tensor and what is wanted (error, size, or a trade-off), :func:`search` finds the tensor network that
stores it in the fewest parameters, fits it, and says how far from optimal it can still be.
"""

from tnss.executor import Joblib, Local, Ray
from tnss.fit import ALS, FitRequest, Fitter
from tnss.methods.auto import AutoOptions
from tnss.methods.greedy import GreedyOptions
from tnss.methods.tnale import TnALEOptions
from tnss.methods.tnga import TNGAOptions
from tnss.methods.tnls import TNLSOptions
from tnss.network import Network, relative_squared_error
from tnss.objective import ErrorBudget, Lagrangian, ParameterBudget
from tnss.result import Record, Result
from tnss.search import Budget, Control, Progress, search
from tnss.space import Complete, Graph, Point, Ring, Train, Tree
from tnss.spectrum import Spectrum
from tnss.structure import Structure

__all__ = [
    "ALS",
    "AutoOptions",
    "Budget",
    "Complete",
    "Control",
    "ErrorBudget",
    "FitRequest",
    "Fitter",
    "Graph",
    "GreedyOptions",
    "Joblib",
    "Lagrangian",
    "Local",
    "Network",
    "ParameterBudget",
    "Point",
    "Progress",
    "Ray",
    "Record",
    "Result",
    "Ring",
    "Spectrum",
    "Structure",
    "TNGAOptions",
    "TNLSOptions",
    "TnALEOptions",
    "Train",
    "Tree",
    "relative_squared_error",
    "search",
]
