"""URLs as inputs, against a real name server and real web servers on the loopback network."""

import asyncio
import base64
import gzip
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from service.api.keys import create_key
from service.contract.errors import InputError, MediaTooLarge
from service.engine.addresses import public
from service.engine.fetch import FetchConfig, Fetcher, Fetches, Rules, Url, fetch_config
from service.errors import FetchFailed, FetchRefused
from service.runtime.quotas import Limit
from service.settings import Settings, SettingsError
from tests.conftest import serving
from tests.service.internet import Internet, internet, options

MOST = 100_000


class Seen:
    def __init__(self) -> None:
        self.results: list[str] = []

    def fetched(self, result: str, size: int) -> None:
        self.results.append(result)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Internet]:
    with internet(tmp_path_factory.mktemp("internet")) as net:
        net.inner.give("/", b"secret")
        net.media.give("/a", b"a picture")
        yield net


@pytest.fixture(autouse=True)
def _nothing_inner_is_reached(net: Internet) -> Iterator[None]:
    """Whatever a test tries, 127.0.0.1 must not have been asked, nor spoken to."""
    yield
    assert net.inner.asked == []
    assert net.inner.names == []


_opened: dict[str, FetchConfig] = {}


def opened(settings: Settings) -> FetchConfig:
    """Open each once: to read the public authorities takes long."""
    key = settings.model_dump_json()
    if key not in _opened:
        made = fetch_config(settings)
        assert made is not None
        _opened[key] = made
    return _opened[key]


def fetch(
    net: Internet, *urls: str, most: int = MOST, seen: Seen | None = None, timeout_s: float = 10.0, **more: Any
) -> list[bytes | InputError]:
    settings = Settings(**options(net, **more))

    async def one(fetcher: Fetcher, url: str) -> bytes | InputError:
        try:
            return await fetcher.fetch(url, most)
        except InputError as error:
            return error

    async def run() -> list[bytes | InputError]:
        fetcher = Fetcher(opened(settings), settings, (seen or Seen()).fetched, timeout_s=timeout_s)
        return [await one(fetcher, url) for url in urls]

    return asyncio.run(run())


def refused(result: bytes | InputError, kind: type[InputError] = FetchFailed) -> bool:
    assert type(result) is kind, result
    return True


# What is fetched, and how


def test_a_url_is_fetched_with_its_name_in_tls_and_in_host_and_nothing_of_ours(
    net: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{net.port}")
    seen = Seen()
    assert fetch(net, net.url("/a"), seen=seen) == [b"a picture"]
    path, headers = net.media.asked[-1]
    assert (path, headers["host"], net.media.names[-1]) == ("/a", f"media.test:{net.port}", "media.test")
    assert set(headers) == {"host", "user-agent", "accept", "accept-encoding", "connection"}
    assert seen.results == ["fetched"]


def test_a_name_is_resolved_once_and_the_connection_goes_there(net: Internet) -> None:
    net.names.set("rebinding.media.test", ["127.0.0.2"], ["127.0.0.1"])
    url = net.url("/a", "rebinding.media.test")
    first, second = fetch(net, url, url)
    assert first == b"a picture"
    assert refused(second)
    assert net.names.asked["rebinding.media.test", "A"] == 2


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["127.0.0.2", "127.0.0.1"],
        ["127.0.0.1", "127.0.0.2"],
        ["127.0.0.2", "::1"],
        ["127.0.0.2", "::ffff:127.0.0.1"],
        ["::ffff:127.0.0.2"],
        ["64:ff9b::7f00:1"],
        ["fe80::1"],
        ["0.0.0.0"],
        ["169.254.169.254"],
        [],
    ],
)
def test_a_name_with_an_address_that_is_not_public_is_not_fetched(addresses: list[str], net: Internet) -> None:
    net.names.set("mixed.media.test", addresses)
    (result,) = fetch(net, net.url("/a", "mixed.media.test"))
    assert refused(result)
    assert str(result) == "the URL could not be fetched"  # as for a name that does not exist
    (absent,) = fetch(net, net.url("/a", "absent.test"))
    assert (type(absent), str(absent)) == (type(result), str(result))


def test_search_lists_and_hosts_files_do_not_count(net: Internet) -> None:
    assert all(refused(each) for each in fetch(net, net.url("/", "localhost"), net.url("/", "media")))


def test_the_second_address_is_tried_where_the_first_does_not_answer(net: Internet) -> None:
    net.names.set("two.media.test", ["127.0.0.3", "127.0.0.2"])
    assert fetch(net, net.url("/a", "two.media.test"), fetch_allow=("127.0.0.2/31",)) == [b"a picture"]


# Redirects


def test_redirects_are_followed_hop_by_hop_without_cookies(net: Internet) -> None:
    net.media.lead("/one", "/two", 301)
    net.media.lead("/two", net.url("/a", "other.media.test"), 307)
    net.names.set("other.media.test", ["127.0.0.2"])
    assert fetch(net, net.url("/one")) == [b"a picture"]
    assert "cookie" not in net.media.asked[-1][1]
    assert net.media.asked[-1][1]["host"] == f"other.media.test:{net.port}"


@pytest.mark.parametrize(
    "to",
    [
        "https://127.0.0.1:{port}/",
        "https://inner.test:{port}/",
        "//127.0.0.1:{port}/",
        "https://[::1]:{port}/",
        "https://[::ffff:127.0.0.1]:{port}/",
        "https://127.1:{port}/",
        "https://2130706433:{port}/",
        "https://0x7f000001:{port}/",
        "https://0177.0.0.1:{port}/",
        "https://localhost:{port}/",
        "https://media.test:{port}@127.0.0.1:{port}/",
        "https://media.test:{port}\\@127.0.0.1:{port}/",
        "\\\\127.0.0.1:{port}/",
        "http://media.test:{port}/a",
        "https://media.test/a",
        "file:///etc/passwd",
        "ftp://media.test/",
        "gopher://127.0.0.1:{port}/",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "",
        "https://\t127.0.0.1:{port}/",
    ],
)
def test_a_redirect_to_where_nothing_is_fetched_from_is_not_followed(to: str, net: Internet) -> None:
    net.media.lead("/away", to.format(port=net.port))
    (result,) = fetch(net, net.url("/away"))
    assert isinstance(result, FetchRefused | FetchFailed)
    assert net.media.asked[-1][0] == "/away"


def test_redirects_end(net: Internet) -> None:
    net.media.lead("/round", "/round")
    before = len(net.media.asked)
    assert all(refused(each) for each in fetch(net, net.url("/round")))
    assert len(net.media.asked) == before + 4


# What is not a URL of something public


@pytest.mark.parametrize(
    "url",
    [
        "https://",
        "https:///a",
        "https:media.test/a",
        "https:/media.test/a",
        "https://media.test:443:443/",
        "https://media.test:port/",
        "https://media.test:/",
        "https://user@media.test/",
        "https://user:password@media.test/",
        "https://media.test@127.0.0.1/",
        "https://media.test%40127.0.0.1/",
        "https://media.test\\@127.0.0.1/",
        "https://media.test\\.127.0.0.1/",
        "https:\\\\127.0.0.1/",
        "https://127.0.0.1\\.media.test/",
        "https://media.test/a\\b",
        "https://media.test/a b",
        "https://media.test/\na",
        "https://media.test/\r\nHost: inner.test",
        "https://media.test/\0",
        "https://me\tdia.test/",
        "https://média.test/",
        "https://media.test/é",
        "https://ⓜedia.test/",
        "https://127。0。0。1/",
        "https://１２７.0.0.1/",
        "https://media%2etest/",
        "https://[::1]extra/",
        "https://[fe80::1%25eth0]/",
        "https://[fe80::1%eth0]/",
        "https://[::1/",
        "https://::1/",
        "https://[v1.x]/",
        "https://[127.0.0.1]/",
        "https://[::ffff:127.0.0.01]/",
        "https://127.1/",
        "https://127.0.1/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.0.0.1/",
        "https://0x7f.1/",
        "https://0177.0.0.1/",
        "https://017700000001/",
        "https://127.0.0.01/",
        "https://127.0.0.1.2/",
        "https://256.0.0.1/",
        "https://4294967296/",
        "https://1/",
        "https://0/",
        "https://0x/",
        "https://a.0x1/",
        "https://.media.test/",
        "https://media..test/",
        "https://media.test../",
        "https://-media.test/",
        "https://media-.test/",
        f"https://{'a' * 64}.test/",
        f"https://{'a.' * 127}test/",
        f"https://media.test/{'a' * 2048}",
        "file:///etc/passwd",
        "ftp://media.test/",
        "HTTPSX://media.test/",
        " https://media.test/",
        "https://media.test/#a\\b",
    ],
)
def test_what_is_no_plain_url_is_refused(url: str) -> None:
    with pytest.raises(FetchRefused):
        Url.parse(url)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("https://media.test", "https://media.test/"),
        ("HTTPS://Media.TEST/A?B=c#d", "https://media.test/A?B=c"),
        ("https://media.test.:443/a", "https://media.test/a"),
        ("http://media.test:80?x=/../?", "http://media.test/?x=/../?"),
        ("http://media.test:8080/%2e%2e/a@b:c", "http://media.test:8080/%2e%2e/a@b:c"),
        ("https://xn--mdia-bpa.test/", "https://xn--mdia-bpa.test/"),
        ("https://a_b.test/{x}|^`", "https://a_b.test/{x}|^`"),
        ("https://93.184.216.34/", "https://93.184.216.34/"),
        ("https://[2606:2800:0220:0001::1]:8443/", "https://[2606:2800:220:1::1]:8443/"),
    ],
)
def test_a_plain_url_is_put_together_from_its_parts(text: str, read: str) -> None:
    url = Url.parse(text)
    assert str(url) == read
    assert Url.parse(str(url)) == url


@given(st.text(st.characters(codec="ascii"), max_size=40))
@hypothesis_settings(deadline=None, max_examples=300)
def test_any_url_is_refused_or_read_as_httpx_reads_it(text: str) -> None:
    try:
        url = Url.parse(f"https://{text}")
    except FetchRefused:
        return
    other = httpx.URL(f"https://{text}")
    assert (url.host, url.port) == (other.host.rstrip(".").lower(), other.port or 443)
    assert other.userinfo == b""


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
        "168.63.129.16", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.0.192", "192.0.2.1",
        "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255",
        "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8",
        "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "2001::1", "2001:0:7f00:1::", "2001:20::1",
        "2001:db8::1", "2002:7f00:1::", "2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1",
        "fec0::1", "ff02::1", "fe80::1%1", "2606:4700::1111%1",
    ],
)  # fmt: skip
def test_what_is_not_of_the_public_internet(address: str) -> None:
    assert not public(ip_address(address))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "93.184.216.34", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1"]
)
def test_what_is(address: str) -> None:
    assert public(ip_address(address))


@given(st.integers(0, 2**32 - 1).map(IPv4Address) | st.integers(0, 2**128 - 1).map(IPv6Address))
@hypothesis_settings(max_examples=500)
def test_nothing_that_python_calls_inner_is_public(address: IPv4Address | IPv6Address) -> None:
    if public(address):
        assert address.is_global and not address.is_multicast and not address.is_reserved


# The operator's rules


def test_only_https_unless_http_is_allowed_too(net: Internet) -> None:
    plain = net.site("127.0.0.2", tls=False)
    plain.give("/a", b"plain")
    url = f"http://media.test:{plain.port}/a"
    (over_https,) = fetch(net, url, fetch_ports=(plain.port,))
    assert refused(over_https, FetchRefused)
    assert fetch(net, url, fetch="http", fetch_ports=(plain.port,)) == [b"plain"]


def test_only_ports_that_are_listed(net: Internet) -> None:
    assert all(refused(each, FetchRefused) for each in fetch(net, net.url("/a"), fetch_ports=(443,)))
    assert Rules.of(Settings(fetch="https")).ports == {443}
    assert Rules.of(Settings(fetch="http")).ports == {80, 443}


def test_names_that_are_listed_are_the_only_ones_and_denied_ones_are_none(net: Internet) -> None:
    net.names.set("a.media.test", ["127.0.0.2"])
    net.names.set("evilmedia.test", ["127.0.0.2"])
    allowed = ("127.0.0.2", "*.media.test")
    urls = [net.url("/a", host) for host in ("a.media.test", "A.Media.Test.", "media.test", "evilmedia.test")]
    one, two, whole, other = fetch(net, *urls, fetch_allow=allowed)
    assert one == two == b"a picture"
    assert refused(whole, FetchRefused) and refused(other, FetchRefused)
    denied, fine = fetch(net, urls[0], urls[2], fetch_allow=("127.0.0.2",), fetch_deny=("*.media.test",))
    assert refused(denied, FetchRefused)
    assert fine == b"a picture"
    (network,) = fetch(net, urls[2], fetch_deny=("127.0.0.0/8",))
    assert refused(network)


def test_an_address_as_host_obeys_the_rules_too(net: Internet) -> None:
    assert fetch(net, net.url("/a", "127.0.0.2")) == [b"a picture"]
    assert fetch(net, net.url("/a", "127.0.0.2"), fetch_allow=("127.0.0.2", "media.test")) == [b"a picture"]
    urls = [net.url("/", host) for host in ("127.0.0.1", "[::1]", "[::ffff:127.0.0.2]", "10.0.0.1", "8.8.8.8")]
    for result in fetch(net, *urls, fetch_allow=("127.0.0.2", "media.test")):
        assert refused(result, FetchRefused)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fetch_allow", "10.0.0.1/8"),
        ("fetch_allow", "a/b"),
        ("fetch_allow", "*"),
        ("fetch_deny", "127.1"),
        ("fetch_deny", "exa mple.org"),
        ("fetch_dns", "dns.example"),
        ("fetch_ca", "/absent.pem"),
    ],
)
def test_what_the_operator_wrote_wrongly_stops_the_start(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"ISTHMUS_{name.upper()}"):
        fetch_config(Settings(**{"fetch": "https", "fetch_dns": "127.0.0.1", name: value}))


# What the other side may do


def test_too_much_is_refused_as_soon_as_it_is_known(net: Internet) -> None:
    big = b"x" * (MOST + 1)
    net.media.give("/stated", b"", Content_Length=str(10**12))
    net.media.give("/big", big)
    net.media.give("/just", big[:-1])
    net.media.say("/endless", b"HTTP/1.1 200 OK\r\n\r\n" + big)
    net.media.drip(
        "/chunks", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"ffff\r\n" + b"x" * 65_535 + b"\r\n"
    )
    seen = Seen()
    urls = [net.url(path) for path in ("/stated", "/big", "/endless", "/chunks", "/just")]
    *over, just = fetch(net, *urls, seen=seen)
    assert all(refused(each, MediaTooLarge) for each in over)
    assert just == big[:-1]
    assert seen.results == ["too_large"] * 4 + ["fetched"]


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (b"", b""),
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
)
def test_a_server_that_drips_is_left_when_the_time_is_up(first: bytes, drop: bytes, net: Internet) -> None:
    net.media.drip("/drip", first, drop)
    assert all(refused(each) for each in fetch(net, net.url("/drip"), timeout_s=0.5))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"hello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\nbody",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.1 500 Oh\r\nContent-Length: 1\r\n\r\na",
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 40\r\n\r\n" + gzip.compress(b"x" * 40).ljust(40),
        b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\na",
    ],
)
def test_an_answer_that_is_none_fails_without_saying_why(raw: bytes, net: Internet) -> None:
    net.media.say("/raw", raw)
    (result,) = fetch(net, net.url("/raw"), timeout_s=5)
    assert isinstance(result, FetchFailed | FetchRefused)
    assert str(result).startswith(("the URL could not be fetched", "the URL leads on"))


def test_tls_is_verified(net: Internet, tmp_path: Path) -> None:
    other = net.site("127.0.0.2", names=["other.test"])
    other.give("/", b"not media.test's")
    assert all(refused(each) for each in fetch(net, f"https://media.test:{other.port}/", fetch_ports=(other.port,)))
    assert all(refused(each) for each in fetch(net, net.url("/a"), fetch_ca=None))
    assert other.asked == []


def test_nobody_at_a_port_and_no_name_server_look_alike(net: Internet, free_port: int) -> None:
    closed = fetch(net, f"https://media.test:{free_port}/", fetch_ports=(free_port,))
    nameless = fetch(net, net.url("/a"), fetch_dns=f"127.0.0.1:{free_port}", timeout_s=0.5)
    assert [str(each) for each in closed + nameless] == ["the URL could not be fetched"] * 2


def test_so_many_at_a_time_and_each_once(net: Internet) -> None:
    settings = Settings(**options(net))
    within, counts, lock, pair = 0, [], threading.Lock(), threading.Barrier(2)

    def paired(path: str, body: bytes) -> None:
        """A page that is answered once two are asked for; the count goes down before the reader can know of its end."""
        net.media.give(path, body)
        give = net.media.pages[path]

        def page(request: BaseHTTPRequestHandler) -> None:
            nonlocal within
            with lock:
                within += 1
                counts.append(within)
            try:
                pair.wait(30)
            finally:
                with lock:
                    within -= 1
            give(request)

        net.media.pages[path] = page

    for number in range(6):
        paired(f"/many{number}", b"x%d" % number)
    before = len(net.media.asked)

    async def run() -> list[bytes | InputError]:
        fetches = Fetches(Fetcher(opened(settings), settings, Seen().fetched, places=2))
        wanted: list[Any] = [("image", net.url(f"/many{number % 6}")) for number in range(12)]
        first = await fetches.all(wanted)
        assert await fetches.all(wanted) == first
        return first

    assert asyncio.run(run()) == [b"x%d" % (number % 6) for number in range(12)]
    assert max(counts) == 2
    assert len(net.media.asked) == before + 6


def test_a_request_gets_no_more_bytes_than_a_body_may_have(net: Internet) -> None:
    settings = Settings(**options(net, max_body_bytes=2_500))
    for number in range(4):
        net.media.give(f"/part{number}", b"x" * 1_000)

    async def run() -> list[bytes | InputError]:
        fetches = Fetches(Fetcher(opened(settings), settings, Seen().fetched, places=1))
        return await fetches.all([("image", net.url(f"/part{number}")) for number in range(4)])

    results = asyncio.run(run())
    assert [isinstance(each, MediaTooLarge) for each in results] == [False, False, True, True]


# Through the routes


@pytest.fixture(scope="module")
def fetching(
    net: Internet,
    bundle_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    png: Callable[..., bytes],
    wav: Callable[..., bytes],
) -> Iterator[httpx.Client]:
    net.media.give("/red.html", png("red"), Content_Type="text/html")  # what it is, its content says
    net.media.give("/tone", wav())
    net.media.give("/page.png", b"<html>no picture</html>", Content_Type="image/png")
    store = tmp_path_factory.mktemp("fetching") / "store"
    with serving(Settings(bundle=bundle_dir, store=store, device="cpu", threads=1, **options(net))) as client:
        yield client


def test_every_route_takes_urls(net: Internet, fetching: httpx.Client, png: Callable[..., bytes]) -> None:
    url = {"image": net.url("/red.html")}
    sound = {"audio": net.url("/tone")}
    data = {"image": base64.b64encode(png("red")).decode()}

    def post(path: str, **body: Any) -> Any:
        response = fetching.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    embedded = post("/embed", inputs=[url, data, sound])["embeddings"]
    assert embedded[0]["embedding"] == embedded[1]["embedding"]
    assert [each["modality"] for each in embedded] == ["image", "image", "audio"]
    assert post("/classify", inputs=[url], labels=["red", "blue"])["results"][0]["labels"][0]["label"] == "red"
    assert post("/classify", inputs=[url], labels=["red", "blue"], grid={"rows": 1, "columns": 2})["results"][0][
        "cells"
    ]
    assert post("/score", pairs=[{"a": url, "b": data}])["scores"][0] == pytest.approx(1.0)
    assert post("/items", items=[{"id": "red", **url}])["upserted"] == 1
    assert post("/search", query=url, top_k=1)["results"][0]["id"] == "red"
    assert post("/search", query={"compose": [{**url, "weight": 2.0}, {"text": "red"}]})["results"]
    labels = {"labels": [{"name": "red", "examples": [url]}, "blue"]}
    assert fetching.put("/label-sets/colours", json=labels).status_code == 200
    vector = post("/v1/embeddings", model="tiny", input=[url])["data"][0]["embedding"]
    assert vector == pytest.approx(embedded[0]["embedding"])
    with openai.OpenAI(base_url=f"{fetching.base_url}/v1", api_key="none", max_retries=0) as official:
        made = official.embeddings.create(model="tiny", input=[url])  # type: ignore[list-item]
        assert made.data[0].embedding == pytest.approx(vector)
    timing = fetching.post("/embed", json={"inputs": [url]}).headers["server-timing"]
    assert "fetch;dur=" in timing
    assert 'isthmus_fetches_total{result="fetched"}' in fetching.get("/metrics").text


def test_a_url_that_fails_fails_alone(net: Internet, fetching: httpx.Client) -> None:
    inputs = [
        "red",
        {"image": net.url("/", "127.0.0.1")},
        {"image": net.url("/absent")},
        {"image": net.url("/page.png")},
        {"image": net.url("/red.html")},
        {"image": f"http://media.test:{net.port}/red.html"},
    ]
    answer = fetching.post("/embed", json={"inputs": inputs, "on_error": "null"}).json()["embeddings"]
    codes = [each["error"]["code"] if each.get("error") else None for each in answer]
    assert codes == [None, "url_refused", "url_fetch_failed", "unsupported_media", None, "url_refused"]
    failed = fetching.post("/embed", json={"inputs": inputs})
    assert (failed.status_code, failed.json()["index"], failed.json()["code"]) == (422, 1, "url_refused")
    for secret in ("127.0.0", "media.test", str(net.port)):
        assert secret not in json.dumps([answer, failed.json()])


def test_urls_are_refused_unless_fetching_is_on(net: Internet, shared_client: httpx.Client) -> None:
    before = len(net.media.asked)
    for url in (net.url("/red.html"), "HTTP://media.test/a", "https:x"):
        response = shared_client.post("/embed", json={"inputs": [{"image": url}]})
        assert (response.status_code, response.json()["code"]) == (422, "url_fetch_disabled")
    assert len(net.media.asked) == before


def test_a_url_costs_an_item_before_it_is_fetched_and_once(net: Internet, settings: Settings, tmp_path: Path) -> None:
    _, clear = create_key(tmp_path / "keys.json", "k", ["read"], [Limit.parse("items=3/month")])
    update = options(net) | {"keys": tmp_path / "keys.json"}
    with serving(settings.model_copy(update=update)) as client:

        def embed(*inputs: Any) -> httpx.Response:
            return client.post("/embed", json={"inputs": inputs}, headers={"Authorization": f"Bearer {clear}"})

        url = {"image": net.url("/red.html")}
        first = embed(url, "red")
        assert (first.status_code, first.headers["ratelimit-remaining"]) == (200, "1")
        before = len(net.media.asked)
        assert embed(url, {"image": net.url("/tone")}).status_code == 429
        assert len(net.media.asked) == before
        assert embed("red").status_code == 200
