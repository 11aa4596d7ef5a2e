"""Images of a request: data URLs, and, if enabled, public http(s) URLs.

Protection against server-side request forgery: a host name is resolved once, all its addresses must be public, and the
connection uses the checked address, so a second DNS answer has no effect. Each redirect is checked in the same way.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from urllib.parse import urljoin, urlsplit

from clips_mllm.talk.recipe import Limits
from clips_mllm.talk.serve.errors import BadRequest

MAX_REDIRECTS = 3
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # wraps an IPv4 address


def image_bytes(url: str, limits: Limits) -> bytes:
    """Return the encoded image of a URL.

    Raises:
        BadRequest: not a data URL or an allowed address, too large, or not available.
    """
    if url.startswith("data:"):
        return decode_data_url(url, limits)
    if url_scheme(url) not in ("http", "https"):
        raise _error("only base64 data URLs (data:image/png;base64,...) are supported, no files", "invalid_image_url")
    if not limits.remote_images:
        raise _error("remote images are disabled; send the image as a base64 data URL", "remote_images_disabled")
    return fetch(url, limits)


def url_scheme(url: str) -> str:
    """Return the scheme of a URL; empty if it has none."""
    try:
        return urlsplit(url).scheme.lower()
    except ValueError:
        return ""


def decode_data_url(url: str, limits: Limits) -> bytes:
    """Decode `data:image/...;base64,...`."""
    head = DATA_URL.match(url)
    if head is None:
        raise _error(
            "the data URL of an image starts with data:image/png;base64, (or another type)", "invalid_image_url"
        )
    if (len(url) - head.end()) * 3 // 4 > limits.image_bytes + 2:  # padding adds up to two bytes to this estimate
        raise too_large(limits)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise _error("invalid base64", "invalid_image_url") from None


def too_large(limits: Limits) -> BadRequest:
    """Return the error for an image with too many bytes."""
    return _error(f"the image is larger than {limits.image_bytes:,} bytes", "image_too_large", status=413)


def public_addresses(host: str, port: int) -> list[str]:
    """Resolve a host. Raises BadRequest unless all its addresses are public."""
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError):
        raise _error("unknown host", "host_not_found") from None
    if not addresses or not all(is_public(address) for address in addresses):
        raise _error("the host is not on the public internet", "host_not_public")
    return addresses


def is_public(address: str) -> bool:
    """Return False for private, loopback, link-local, multicast and reserved addresses, and for invalid ones."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def fetch(url: str, limits: Limits) -> bytes:
    """Download an image within the limits of time and size, following at most MAX_REDIRECTS redirects."""
    deadline = time.monotonic() + limits.fetch_seconds
    for _ in range(MAX_REDIRECTS + 1):
        try:
            content, redirect = _get(url, limits, deadline)
        except (OSError, http.client.HTTPException, ValueError):  # includes timeouts and TLS errors
            raise _error("the image could not be fetched in time", "fetch_failed") from None
        if redirect is None:
            return content
        url = urljoin(url, redirect)
        if url_scheme(url) not in ("http", "https"):
            raise _error("redirect to a URL that is not http(s)", "invalid_redirect")
    raise _error(f"more than {MAX_REDIRECTS} redirects", "too_many_redirects")


def _error(problem: str, code: str, status: int = 400) -> BadRequest:
    return BadRequest(problem, param="image_url", status=status, code=code)


def _get(url: str, limits: Limits, deadline: float) -> tuple[bytes, str | None]:
    """Return the image, or the target of a redirect."""
    parts = urlsplit(url)
    if parts.username is not None or not parts.hostname:
        raise _error("expected an http(s) URL without user and password", "invalid_image_url")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = public_addresses(parts.hostname, port)[0]
    connection = http.client.HTTPConnection(parts.hostname, port)
    sock = connection.sock = _connect(address, port, parts.hostname, parts.scheme == "https", deadline)
    # Socket timeouts apply to each read, so a server could drip bytes forever: cut the connection at the deadline.
    watchdog = threading.Timer(_seconds_left(deadline), _cut, (sock,))
    watchdog.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "clips-mllm", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return b"", response.headers.get("Location", "")
        if response.status != 200:
            raise _error(f"the host answered with status {response.status}", "fetch_failed")
        return _read(response, limits, deadline), None
    finally:
        watchdog.cancel()
        connection.close()


def _connect(address: str, port: int, host: str, tls: bool, deadline: float) -> socket.socket:
    sock = socket.create_connection((address, port), timeout=_seconds_left(deadline))
    return ssl.create_default_context().wrap_socket(sock, server_hostname=host) if tls else sock


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _read(response: http.client.HTTPResponse, limits: Limits, deadline: float) -> bytes:
    content = bytearray()
    while True:
        block = response.read1(65_536)
        _seconds_left(deadline)  # raises: a connection that was cut looks like the end of the body
        if not block:
            return bytes(content)
        content += block
        if len(content) > limits.image_bytes:
            raise too_large(limits)


def _seconds_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
