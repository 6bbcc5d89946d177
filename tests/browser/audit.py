"""What a reader would complain about, measured in the page: cut text, overlaps, low contrast, small targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.async_api import Page

__all__ = ["complaints"]

_AUDIT = r"""() => {
    const found = [];
    const name = (node) => `${node.id ? "#" + node.id : "." + node.className}`.trim() + ` "${node.textContent.trim().slice(0, 30)}"`;
    const box = (node) => node.getBoundingClientRect();
    const isShown = (node) => node.checkVisibility({ visibilityProperty: true }) && box(node).width > 1;
    const inView = (node) => box(node).bottom > 0 && box(node).top < innerHeight;
    const shown = (selector) => [...document.querySelectorAll(selector)].filter((node) => isShown(node) && inView(node));

    // Sides
    if (document.documentElement.scrollWidth > innerWidth) found.push(`the page is ${document.documentElement.scrollWidth} px wide`);
    for (const node of shown("body *")) {
        if (node.closest("svg")) continue;
        const { left, right } = box(node);
        if (left < -0.5 || right > innerWidth + 0.5) found.push(`${name(node)} leaves the screen`);
    }

    // Overlaps of what stands side by side, or below one another
    for (const parent of shown(".bar, .head, .row, .foot, .card, .figures, .figures div, #nothing, .samples, header, main")) {
        const children = [...parent.children].filter((node) => isShown(node) && getComputedStyle(node).position === "static");
        for (const [index, one] of children.entries()) {
            for (const other of children.slice(index + 1)) {
                const [a, b] = [box(one), box(other)];
                const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
                const along = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
                if (across > 1 && along > 1) found.push(`${name(one)} overlaps ${name(other)}`);
            }
        }
    }

    // Text that is cut has a title with all of it, or stands in a field or in a pane that scrolls.
    for (const node of shown("body *")) {
        const { overflowX, webkitLineClamp } = getComputedStyle(node);
        if (overflowX !== "hidden" || node.matches(".unseen, textarea, input")) continue;
        const isCut = node.scrollWidth > node.clientWidth + 1 || (webkitLineClamp !== "none" && node.scrollHeight > node.clientHeight + 1);
        const all = node.textContent.trim();
        if (isCut && !node.title.includes(all) && !node.title.endsWith(all.slice(1))) found.push(`${name(node)} is cut without a title`);
    }

    // Contrast of WCAG 2.2, AA
    const parse = (colour) => {
        const numbers = colour.match(/[\d.e-]+/g).map(Number);
        return colour.startsWith("color(srgb") ? [...numbers.slice(0, 3).map((n) => n * 255), numbers[3] ?? 1] : [...numbers.slice(0, 3), numbers[3] ?? 1];
    };
    const over = ([r, g, b, a], below) => [r, g, b].map((n, at) => n * a + below[at] * (1 - a));
    const ground = (node) => (node === null ? [255, 255, 255] : over(parse(getComputedStyle(node).backgroundColor), ground(node.parentElement)));
    const luminance = (colour) => {
        const [r, g, b] = colour.map((n) => n / 255).map((n) => (n <= 0.04045 ? n / 12.92 : ((n + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const check = (node, colour, least, what) => {
        const below = ground(node);
        const [light, dark] = [luminance(over(parse(colour), below)), luminance(below)].sort((a, b) => b - a);
        const ratio = (light + 0.05) / (dark + 0.05);
        if (ratio < least) found.push(`${what} of ${name(node)} has a contrast of ${ratio.toFixed(2)}`);
    };
    for (const node of shown("body *")) {
        if (node.closest("svg, .voided .choices")) continue;
        const hasText = node.matches("input, textarea") || [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
        if (hasText) check(node, getComputedStyle(node).color, 4.5, "text");
        if (node.matches("input, textarea")) check(node, getComputedStyle(node, "::placeholder").color, 4.5, "placeholder");
    }
    for (const node of shown(".icon")) check(node.parentElement, getComputedStyle(node).color, 3, "icon");

    // Targets of WCAG 2.2, 2.5.8
    for (const node of shown("button, a, input, textarea, summary")) {
        const { width, height } = box(node);
        if (width < 24 || height < 24) found.push(`${name(node)} is a target of ${Math.round(width)} x ${Math.round(height)}`);
    }
    return found;
}"""


async def complaints(page: Page) -> list[str]:
    """Return what is wrong with the visible part of the page, one line each."""
    found: list[str] = await page.evaluate(_AUDIT)
    return sorted(set(found))
