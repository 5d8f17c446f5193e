"""Tests; on a machine that others use too, no analysis is cut short for lack of time unless a test asks for that."""

import math

from lightning_graphon.callbacks._analysis.time_budget import TimeBudget

TimeBudget.floor = math.inf
