"""Coupled channels of a model: found, ranked, taken out, saved.

From the ground up: ``channel_sets`` (plain objects), ``surgery`` and ``shortcuts`` (cutting),
``dependency_graph`` (candidates), ``channel_trial`` (each tried out), ``channels``, ``compact``,
``importance``; beside them ``compaction_report``, and ``compact_description`` and
``compact_checkpoint`` for files.
"""

from .channel_sets import ChannelIndex, Channels, ChannelSet, ExcludedSet
from .channels import channels
from .compact import Compacted, compact, zero_dead_columns
from .compact_checkpoint import load_compact, save_compact
from .compaction_report import CompactionReport, LayerChange
from .importance import importance, remove

__all__ = [
    "ChannelIndex",
    "ChannelSet",
    "Channels",
    "Compacted",
    "CompactionReport",
    "ExcludedSet",
    "LayerChange",
    "channels",
    "compact",
    "importance",
    "load_compact",
    "remove",
    "save_compact",
    "zero_dead_columns",
]
