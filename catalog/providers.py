"""The kinds of stores that a URL can name, and all in which they differ: names, environment, client, abilities.

Credentials and endpoints come from the environment, by the names that the tools of each provider know.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from catalog.errors import SetupError


@dataclass(frozen=True)
class Provider:
    """One kind of store."""

    form: str
    """Of its URLs."""
    container: str
    """What it calls that which holds objects."""
    credentials: str
    """What to look at when access is denied."""
    prefixes: tuple[str, ...]
    """Of the environment variables that it goes by."""
    endpoints: tuple[str, ...]
    """Those that name another server than the provider's own, the first that is set."""
    is_web: bool = False
    """A plain web server: its files can be read by name, and neither listed nor written."""
    versions: bool = False
    """A conditional write goes by the object's version, not by its etag."""

    @property
    def endpoint(self) -> str | None:
        """URL of the server; None for the provider's own."""
        return next(filter(None, map(os.environ.get, self.endpoints)), None)


_WEB = Provider(
    form="https://HOST/PREFIX",
    container="host",
    credentials="the server wants a login, which this program cannot give: take a copy, or publish it openly",
    prefixes=(),
    endpoints=(),
    is_web=True,
)
PROVIDERS = {
    "s3": Provider(
        form="s3://BUCKET/PREFIX",
        container="bucket",
        credentials="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights of that user",
        prefixes=("AWS_",),
        endpoints=("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    ),
    "gs": Provider(
        form="gs://BUCKET/PREFIX",
        container="bucket",
        credentials=(
            "check GOOGLE_APPLICATION_CREDENTIALS (for a public bucket: GOOGLE_SKIP_SIGNATURE=true) and the "
            "rights of that account"
        ),
        prefixes=("GOOGLE_",),
        endpoints=("GOOGLE_BASE_URL",),
        versions=True,
    ),
    "az": Provider(
        form="az://CONTAINER/PREFIX",
        container="container",
        credentials=(
            "check AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN (for a "
            "public container: AZURE_SKIP_SIGNATURE=true), and their rights"
        ),
        prefixes=("AZURE_", "AZURITE_"),
        endpoints=("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    ),
    "https": _WEB,
    "http": _WEB,
}
"""By the scheme of their URLs."""

_ALIASES = {"s3a": "s3", "azure": "az", "adl": "az", "abfs": "az", "abfss": "az"}
"""Other names for schemes, as Hadoop and fsspec have them."""
_URL = re.compile(r"([a-z0-9]+)://([^/?#]+)/*([^?#]*)")
_IN_AN_ACCOUNT = re.compile(r"([^@]+)@([^@.]+)(?:\.[^@]*)?")
"""Azure's container@account.dfs.core.windows.net."""


def parse(url: str) -> tuple[str, str, str]:
    """Scheme, bucket (container, host) and key of a URL; SetupError for one of another kind."""
    match = _URL.fullmatch(url)
    scheme = _ALIASES.get(match[1], match[1]) if match else ""
    if match is None or scheme not in PROVIDERS:
        forms = ", ".join(dict.fromkeys(provider.form for provider in PROVIDERS.values()))
        raise SetupError(
            f"{url} is no place for a corpus or raw images: give a folder, or one of {forms}. "
            "Any S3-compatible store will do for s3://: AWS_ENDPOINT_URL says where it is."
        )
    container, key = match[2], "/".join(filter(None, match[3].split("/")))
    if {".", ".."} & set(key.split("/")):
        raise SetupError(f"{url} must not have '.' or '..' in it.")
    account = _IN_AN_ACCOUNT.fullmatch(container)
    if account is not None and scheme == "az":
        container = f"{account[1]}@{account[2]}"
    elif "@" in container:
        # It would be in every message, and in logs.
        raise SetupError(f"{url.split('://')[0]}://...@...: a URL must hold no login. Leave it out.")
    return scheme, container, key


def client(scheme: str, container: str, options: dict[str, Any]) -> Any:
    """The library's client of a bucket, container or host, for the environment as it is now.

    Args:
        options: `client_options` and `retry_config` of the library.

    Raises SetupError if settings are missing or make no sense.
    """
    obstore, provider = library(), PROVIDERS[scheme]
    if provider.is_web:
        return obstore.store.HTTPStore(f"{scheme}://{container}", **_allowing(options, http=scheme == "http"))
    url = provider.endpoint
    options = _allowing(options, http=(url or "").startswith("http://"))
    try:
        if scheme == "s3":
            given = {"endpoint": url, "region": region()}
            named = {name: value for name, value in given.items() if value is not None}
            return obstore.store.S3Store(container, **named, **options)
        if scheme == "gs":
            return obstore.store.GCSStore(container, **options)
        name, _, account = container.partition("@")
        return obstore.store.AzureStore(name, **({"account_name": account} if account else {}), **options)
    except (obstore.exceptions.BaseError, ValueError, OSError):
        # The library's text may quote a key.
        raise SetupError(
            f"{scheme}://{container}: the settings for it are incomplete or wrong; {provider.credentials}."
        ) from None


def _allowing(options: dict[str, Any], *, http: bool) -> dict[str, Any]:
    return options | {"client_options": options["client_options"] | {"allow_http": http}}


def environment(scheme: str) -> tuple[tuple[str, str], ...]:
    """The variables that a client of this kind goes by."""
    prefixes = PROVIDERS[scheme].prefixes
    return tuple(sorted(item for item in os.environ.items() if prefixes and item[0].startswith(prefixes)))


def region() -> str | None:
    """Region of an S3 store. Those who run their own rarely name one, and any will do there."""
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return named or ("us-east-1" if PROVIDERS["s3"].endpoint else None)


def library() -> Any:
    """The package that speaks with stores; SetupError if it is not installed."""
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise SetupError(
            "an object store takes the package obstore. Install it: pip install 'pumit-data[remote]'."
        ) from error
    return obstore
