"""The exception tree.

LiveprunError
├── ArchitectureError   the model family, or a feature of this model, is not supported
├── PlanError           a plan is malformed, or does not fit the model
├── CheckpointError     files of a checkpoint are missing, damaged or contradict its config
├── DataError           calibration or evaluation rows are unusable
├── VariantError        a variant is unknown, its name is taken, or it cannot be live
├── ConflictError       the operation must wait for another, or comes at the wrong time
├── EngineError         the running engine refused or failed an operation
├── StoreError          the database of variants and jobs failed, or is not what it should be
└── IncompatibleEnvironmentError   the installed software cannot run this

Every message names the thing, what was found and what was expected.
"""

from __future__ import annotations


class LiveprunError(Exception):
    """Base of every error that Liveprune raises on purpose."""


class ArchitectureError(LiveprunError):
    """The model family, or a feature of this model, is not supported."""


class PlanError(LiveprunError):
    """A plan is malformed, or does not fit the model it names."""


class CheckpointError(LiveprunError):
    """Files of a checkpoint are missing, damaged or contradict its config."""


class DataError(LiveprunError):
    """Calibration or evaluation rows are unusable."""


class VariantError(LiveprunError):
    """A variant is unknown, its name is taken, or it cannot be live."""


class ConflictError(LiveprunError):
    """The operation must wait for another one, or comes at the wrong time."""


class EngineError(LiveprunError):
    """The running engine refused or failed an operation."""


class StoreError(LiveprunError):
    """The database of variants and jobs failed, or is not what it should be."""


class IncompatibleEnvironmentError(LiveprunError):
    """The installed software cannot run this."""
