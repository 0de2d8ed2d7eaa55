"""Ask every link of the built site that leads elsewhere whether it still leads somewhere.

python docs/site/links.py .site
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

LINK = re.compile(r'<a [^>]*href="(https?://[^"#]+)')


def refusal(link: str) -> str | None:
    """Why the link leads nowhere; None where it does, or where there is a page that robots may not read."""
    try:
        with urlopen(Request(link, headers={"User-Agent": "Mozilla/5.0"}), timeout=30):  # noqa: S310 - http(s), by LINK
            return None
    except HTTPError as error:
        return None if error.code in {403, 429} else f"{error}"
    except (OSError, ValueError) as error:
        return f"{error}"


def main() -> None:
    """Name each link that leads nowhere with the pages that have it, and leave with 1 if there is one."""
    site, pages = Path(sys.argv[1]), dict[str, list[str]]()
    for page in sorted(site.rglob("*.html")):
        for link in sorted(set(LINK.findall(page.read_text("utf-8")))):
            pages.setdefault(unescape(link), []).append(page.relative_to(site).as_posix())
    with ThreadPoolExecutor(8) as threads:
        refusals = zip(pages, threads.map(refusal, pages), strict=True)
        broken = [f"{link}: {why}; in {', '.join(pages[link])}" for link, why in refusals if why is not None]
    sys.exit("\n".join(broken) or None)


if __name__ == "__main__":
    main()
