"""HTTP with the requests library, for ModelScope and for versions of huggingface_hub before 1.0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.cookiejar import CookieJar

import requests
import urllib3

from converter.hub.repository import HttpResponse, HubConnectionError

_READ_SIZE = 256 << 10  # bytes


@contextmanager
def stream(
    session: requests.Session,
    url: str,
    headers: dict[str, str],
    timeout: tuple[float, float],
    cookies: CookieJar | None = None,
) -> Iterator[HttpResponse]:
    """Send a GET request without following redirects.

    Args:
        session: The session, whose proxies and certificates are used.
        url: The URL to request.
        headers: Headers of this request.
        timeout: Seconds to wait for a connection and for the next bytes.
        cookies: Cookies of this request.

    Raises:
        HubConnectionError: The connection fails, also while the body is read.
    """
    options = {"headers": headers, "timeout": timeout, "cookies": cookies, "stream": True, "allow_redirects": False}
    try:
        # `auth` keeps credentials of ~/.netrc from replacing the token.
        with session.get(url, auth=lambda request: request, **options) as response:  # type: ignore[arg-type]
            body = response.raw.stream(_READ_SIZE, decode_content=False)
            yield HttpResponse(url, response.status_code, response.headers, body)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise HubConnectionError(str(error)) from None
