"""What follows the step that made a job wait, where that step could not carry the message itself."""

from __future__ import annotations

import logging
from contextlib import suppress

from async_endpoints_celery.codec import milliseconds
from async_endpoints_celery.dispatch import Dispatcher, Message, Mode, Publish
from async_endpoints_celery.drivers import Flow
from async_endpoints_celery.errors import ConfigurationError, StoreUnavailable
from async_endpoints_celery.operations import Operations

logger = logging.getLogger("async_endpoints_celery")


def hand_over(operations: Operations, dispatcher: Dispatcher, message: Message) -> Flow[None]:
    """Publish the message of a job that waits since a moment ago, and clear its outbox entry once that is confirmed.

    Failing here is no failure: the entry stands, and the sweep publishes what it names.
    """
    if dispatcher.mode is Mode.ATOMIC:
        return
    try:
        confirmed = yield Publish(message)
    except ConfigurationError:
        logger.exception("the message of job %s (%s) cannot be published", message.job_id, message.name)
        return
    if not confirmed:
        return
    with suppress(StoreUnavailable):  # then the sweep publishes a copy, which runs nothing
        yield operations.dispatched(
            message.job_id,
            attempt=message.attempt,
            delay_ms=milliseconds(message.countdown or 0),
            dispatch_after_ms=dispatcher.redispatch_ms,
        )
