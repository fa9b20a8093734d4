"""The exceptions asyncagent raises on purpose.

AsyncAgentError
├── UsageError             what the user asked for cannot be done: one line, exit status 2
│   └── ConfigError        a flag's value is out of range, or two flags contradict each other
├── CheckpointError        no readable checkpoint, or one that does not fit this run
├── CallFailed             a call on a thread raised what a future cannot carry
├── BatcherError
│   ├── BatcherClosed      we stopped the batcher; nothing was computed for this request
│   ├── BadBatch           the batched function broke its contract (row counts, structure)
│   └── AlreadyAnswered    a batch was answered twice
├── EndOfUnrolls           the unroll queue was closed and is drained
├── ActorLost              an environment vanished under its actor
├── NotFinite              the learner's numbers are none any more: one line, exit status 1
├── TaskEnded              a task is gone in a way that would else pass for an orderly end
├── Stalled                a component has not moved for too long: exit status 3
└── GraceOver              an orderly end took too long: exit status 1
"""


class AsyncAgentError(Exception):
    """Base of every exception that asyncagent raises on purpose."""


class UsageError(AsyncAgentError):
    """What the user asked for cannot be done; the message is one line that says what would be."""


class ConfigError(UsageError):
    """A flag's value is out of range, or two flags contradict each other."""


class CheckpointError(AsyncAgentError):
    """No readable checkpoint where one is needed, or one that does not fit this run."""


class CallFailed(AsyncAgentError):
    """A call on a thread raised what a future cannot carry; ``__cause__`` is what it raised."""


class BatcherError(AsyncAgentError):
    """Base of what goes wrong around a dynamic batch."""


class BatcherClosed(BatcherError):
    """The batcher was closed; this request was not, and will not be, computed."""


class BadBatch(BatcherError):
    """The batched function answered with the wrong number of rows, or a request is malformed."""


class AlreadyAnswered(BatcherError):
    """A batch was answered a second time."""


class EndOfUnrolls(AsyncAgentError):
    """The unroll queue is closed and everything in it has been taken."""


class ActorLost(AsyncAgentError):
    """An environment vanished under its actor."""


class NotFinite(AsyncAgentError):
    """Too many updates were skipped, their numbers being none, or the weights are spoilt."""


class Stalled(AsyncAgentError):
    """A component has not moved for too long; the message says which."""


class TaskEnded(AsyncAgentError):
    """A task is gone in a way that would else pass for an orderly end."""


class GraceOver(AsyncAgentError):
    """An orderly end took longer than --grace_s; the message says what is saved."""


class WireError(AsyncAgentError):
    """A message between learner and actor host is not what was agreed on; one line."""
