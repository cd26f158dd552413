"""What can be wrong with the files of a user, or with what he asked for.

UsageError (ml_models.commands)  one clear line, exit code 2
+-- ConversionError              a checkpoint or a request cannot be converted
    +-- VerificationError        a written checkpoint does not hold what it was made from
"""

from __future__ import annotations

from ml_models.commands import UsageError


class ConversionError(UsageError):
    """A checkpoint or a request cannot be converted; the message names file and tensor."""


class VerificationError(ConversionError):
    """A written checkpoint differs from its source; the message names file and tensor."""
