"""Images from data URLs, and, where allowed, from public web addresses.

A name is looked up once, every address it has must be public, and the connection goes to that very address: a name
that answers differently the second time leads nowhere else. Redirects are followed by hand, each checked alike.
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

from clips_mllm.talk.limits import BadRequest, Limits

REDIRECTS = 3
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


def image_bytes(url: str, limits: Limits) -> bytes:
    """The encoded image behind a URL of a request.

    Raises:
        BadRequest: neither a data URL nor an allowed address, too large, or not to be had.
    """
    if url.startswith("data:"):
        return from_data_url(url, limits)
    if urlsplit_scheme(url) not in ("http", "https"):
        raise BadRequest("image_url: only data URLs with base64 (data:image/png;base64,...) are read; no files")
    if not limits.remote_images:
        raise BadRequest("image_url: remote images are switched off here; send the image as a base64 data URL")
    return fetch(url, limits)


def urlsplit_scheme(url: str) -> str:
    """The URL's scheme; empty where there is none to be seen."""
    try:
        return urlsplit(url).scheme.lower()
    except ValueError:
        return ""


def from_data_url(url: str, limits: Limits) -> bytes:
    """Decode `data:image/...;base64,...`."""
    head = DATA_URL.match(url)
    if head is None:
        raise BadRequest("image_url: a data URL of an image begins with data:image/png;base64, (or another type)")
    if (len(url) - head.end()) * 3 // 4 > limits.image_bytes + 2:
        raise too_large(limits)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest("image_url: its base64 is damaged") from None


def too_large(limits: Limits) -> BadRequest:
    """An image of more bytes than allowed."""
    message = f"image_url: an image may have {limits.image_bytes:,} bytes"
    return BadRequest(message, status=413, code="image_too_large")


def public_addresses(host: str, port: int) -> list[str]:
    """Addresses of a host, all of them public. Raises BadRequest for any other."""
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError):
        raise BadRequest("image_url: its host cannot be found") from None
    if not found or not all(is_public(address) for address in found):
        raise BadRequest("image_url: its host is not on the public internet")
    return found


def is_public(address: str) -> bool:
    """Whether an address is of the public internet: not private, loopback, link-local, multicast or reserved."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64 wraps an IPv4 address
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def fetch(url: str, limits: Limits) -> bytes:
    """Get an image within the limits of time and size, over at most three redirects."""
    deadline = time.monotonic() + limits.fetch_seconds
    for _ in range(REDIRECTS + 1):
        try:
            content, target = _get(url, limits, deadline)
        except (OSError, http.client.HTTPException, ValueError):  # also timeouts and TLS
            raise BadRequest("image_url: the image could not be fetched in time") from None
        if target is None:
            return content
        url = urljoin(url, target)
        if urlsplit_scheme(url) not in ("http", "https"):
            raise BadRequest("image_url: it leads away from http(s)")
    raise BadRequest(f"image_url: more than {REDIRECTS} redirects")


def _get(url: str, limits: Limits, deadline: float) -> tuple[bytes, str | None]:
    """An image, or where it has moved to."""
    parts = urlsplit(url)
    if parts.username is not None or not parts.hostname:
        raise BadRequest("image_url: a plain http(s) address is expected")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = public_addresses(parts.hostname, port)[0]
    connection = http.client.HTTPConnection(parts.hostname, port)
    sock = connection.sock = _connect(address, port, parts.hostname, parts.scheme == "https", deadline)
    # However slowly bytes may drip, in the headers or after them: at the deadline the line is cut.
    watch = threading.Timer(_left(deadline), _cut, (sock,))
    watch.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "clips-mllm", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return b"", response.headers.get("Location", "")
        if response.status != 200:
            raise BadRequest(f"image_url: its host answers {response.status}")
        return _read(response, limits, deadline), None
    finally:
        watch.cancel()
        connection.close()


def _connect(address: str, port: int, host: str, tls: bool, deadline: float) -> socket.socket:
    sock = socket.create_connection((address, port), timeout=_left(deadline))
    return ssl.create_default_context().wrap_socket(sock, server_hostname=host) if tls else sock


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _read(response: http.client.HTTPResponse, limits: Limits, deadline: float) -> bytes:
    found = bytearray()
    while True:
        block = response.read1(65_536)
        _left(deadline)  # a line that was cut looks like the end
        if not block:
            return bytes(found)
        found += block
        if len(found) > limits.image_bytes:
            raise too_large(limits)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
