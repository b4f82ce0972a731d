"""Requests to an object store that speaks S3, made again while what stands against them may pass.

Where and as whom is as for every program of AWS: from the environment and from the profiles in
~/.aws (``AWS_PROFILE``, ``AWS_ENDPOINT_URL`` and so on); unsigned where there are no credentials.

Imported when the first object is asked for: boto3 is an extra, and takes its time.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    SSLError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from sam3cache.errors import ConfigError, StoreError
from sam3cache.features.objects import (
    NUM_REQUESTS,
    SCHEME,
    BeyondEndError,
    ConditionFailedError,
    has_given_up,
)

if TYPE_CHECKING:
    from sam3cache.features.objects import ObjectPath

PATIENCE_VARIABLE = "SAM3CACHE_S3_PATIENCE_S"
PATIENCE_S = 300.0
"""How long a request is made again before it is given up, unless the environment says otherwise."""

ATTEMPT_S = 25.0
"""How long one attempt may be without an answer."""

_CONNECT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_SAID_AFTER_S = 5.0

_WRITES = ("put_object", "copy_object", "delete_object")
_BUSY_CODES = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "InternalError")
_BUSY_STATUSES = (408, 409, 429, 500, 502, 503, 504)
_REFUSED_STATUSES = (401, 403)

# What comes of a network or a server that fails. A connection that is cut tells itself in many
# ways, some of them Python's own.
_PASSING_ERRORS = (
    ConnectionError,
    HTTPClientError,
    HTTPError,
    IncompleteReadError,
    ResponseParserError,
    ConnectionResetError,
    BrokenPipeError,
    TimeoutError,
)

_log = logging.getLogger("sam3cache")


class Connection:
    """A bucket as this process talks to it; safe to use from several threads.

    Attributes:
        leases: what every write in the bucket depends on: raises where a lease is not ours any
            more, and takes whether to ask anew.
        has_answered: whether a request has succeeded.

    Raises:
        ConfigError: when the environment or ~/.aws cannot be made sense of.
    """

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self.leases: dict[object, Callable[[bool], None]] = {}
        self.has_answered = self._is_said = False
        try:
            session = boto3.session.Session()
            credentials = session.get_credentials()
            config = Config(
                # Ours alone: theirs give up after seconds.
                retries={"total_max_attempts": 1},
                connect_timeout=_CONNECT_S,
                read_timeout=ATTEMPT_S - _CONNECT_S,
                max_pool_connections=2 * NUM_REQUESTS,
                # Receipts have checksums of their own, and not every server knows these.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                signature_version=UNSIGNED if credentials is None else None,
            )
            region = session.region_name or "us-east-1"
            self._client = session.client("s3", region_name=region, config=config)
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(
                f"{SCHEME}{bucket}: {_first_line(error)}; check the variables AWS_… of the "
                "environment, and ~/.aws"
            ) from None
        self._identity = (
            "without credentials"
            if credentials is None
            else f"with the credentials found by {credentials.method}"
        )

    def require_leases(self, *, anew: bool = False) -> None:
        """See that every lease is ours.

        Raises:
            StoreBusyError: when one is another's.
        """
        for require in list(self.leases.values()):
            require(anew)

    def ask(
        self,
        operation: str,
        path: ObjectPath,
        *,
        guarded: bool = True,
        patience_s: float | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Make a request, again and again while it fails for reasons that may pass.

        Args:
            operation: as boto3's client calls it.
            path: to be named where it fails.
            guarded: whether a write has to be sure of the leases.
            patience_s: for how long at most; None for as long as the environment says.
            arguments: of the operation.

        Raises:
            FileNotFoundError: when there is no such object.
            ConditionFailedError: when a condition of the request does not hold.
            BeyondEndError: when a range begins behind the end.
            StoreBusyError: when another process has a lease that was ours.
            StoreError: when the bucket is missing, refuses us, or does not answer in time.
        """
        patience_s = min(_patience_s(), float("inf") if patience_s is None else patience_s)
        begun_s = time.monotonic()
        pause_s = _FIRST_PAUSE_S
        while True:
            if guarded and operation in _WRITES:
                # Before every attempt: those before may have taken minutes.
                self.require_leases()
            try:
                answer: dict[str, Any] = getattr(self._client, operation)(
                    Bucket=self._bucket, **arguments
                )
                if "Body" in answer:
                    answer["Body"] = answer["Body"].read()
                self.has_answered, self._is_said = True, False
                return answer
            except ClientError as error:
                why = self._passing(error, path, operation)
            except SSLError as error:
                # A certificate that is refused is so at once; later, a connection has been cut.
                if not self.has_answered:
                    raise self._failure(path, _first_line(error)) from None
                why = _first_line(error)
            except _PASSING_ERRORS as error:
                why = _first_line(error)
            except BotoCoreError as error:
                raise self._failure(path, _first_line(error)) from None
            waited_s = time.monotonic() - begun_s
            if waited_s + pause_s > patience_s:
                raise self._failure(
                    path,
                    f"no answer for {waited_s:.0f} s ({why})",
                    "What is finished is kept: run the same command again once the server is "
                    f"back; {PATIENCE_VARIABLE} says how long to wait for it",
                )
            if waited_s > _SAID_AFTER_S and not self._is_said:
                # Once, however many wait for the same server.
                self._is_said = True
                _log.warning("%s: %s; trying again for up to %.0f s", path, why, patience_s)
            # At random: many that wait for one server shall not come back all at once.
            if has_given_up(pause_s * random.uniform(0.5, 1.0)):
                raise self._failure(path, f"no answer ({why}), and interrupted")
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _passing(self, error: ClientError, path: ObjectPath, operation: str) -> str:
        """Say what ails a request that may be made again; raise for all else."""
        code = str(error.response["Error"].get("Code", ""))
        said = f"{code} {error.response['Error'].get('Message', '')}".strip()
        status = _status(error)
        if status == 412:
            raise ConditionFailedError(str(path)) from None
        if status == 416:
            raise BeyondEndError(str(path)) from None
        lacks_bucket = code == "NoSuchBucket"
        if operation == "head_object" and status == 404:
            # The one request that does not tell a missing object from a missing bucket.
            try:
                self._client.head_bucket(Bucket=self._bucket)
            except ClientError as second:
                lacks_bucket = _status(second) == 404
            except _PASSING_ERRORS as second:
                return _first_line(second)
        if lacks_bucket:
            raise self._failure(
                path, f"there is no bucket {self._bucket}", "Make it, or correct its name"
            ) from None
        if status == 404:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from None
        if status in _REFUSED_STATUSES:
            raise self._failure(
                path,
                f"the server refuses ({said})",
                "Check the credentials, their profile (AWS_PROFILE), and what they may do there",
            ) from None
        if status in _BUSY_STATUSES or code in _BUSY_CODES:
            return said
        if status == 501:
            raise self._failure(
                path,
                f"the server lacks what a store needs ({said})",
                "Write to a folder instead, and copy that: aws s3 sync",
            ) from None
        raise self._failure(path, f"{said} (status {status})") from None

    def _failure(self, path: ObjectPath, what: str, advice: str = "") -> StoreError:
        """Return an error that says who was asked, and as whom."""
        asked = f"asked {self._client.meta.endpoint_url} {self._identity}"
        return StoreError(f"{path}: {what}; {asked}{'. ' + advice if advice else ''}")


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _patience_s() -> float:
    text = os.environ.get(PATIENCE_VARIABLE) or f"{PATIENCE_S}"
    try:
        patience_s = float(text)
    except ValueError:
        patience_s = -1.0
    if not 0 <= patience_s < float("inf"):
        raise ConfigError(f"{PATIENCE_VARIABLE}={text}: expected a number of seconds, such as 300")
    return patience_s
