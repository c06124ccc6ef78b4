"""The report: JSON for programs, a table for people."""

import json


def ms(spread):
    """Median and range, as many digits as mean something."""
    digits = 0 if spread["median"] >= 1000 else 1 if spread["median"] >= 10 else 2
    text = f"{spread['median']:,.{digits}f}"
    return text if len(spread["rounds"]) == 1 else f"{text} ({spread['lowest']:,.{digits}f} to {spread['highest']:,.{digits}f})"


def as_table(report):
    machine = report["machine"]
    lines = [
        f"{machine['cpu']} (family/model {machine['family_model']}; {' '.join(machine['features'])}), {machine['cores']} cores, {machine['system']}",
        f"threads: {report['threads']}; medians of {report['rounds']} rounds that took turns (lowest to highest), ms",
        "; ".join(f"{name} {version}" for name, version in report["versions"].items()),
    ]
    for result in report["results"]:
        lines += ["", f"## {result['peer']}, {result['setting']}", ""]
        lines += [f"* compared first, {entry['side']}: {entry['text']}" for entry in result["agreements"]]
        lines += [f"* {name}: {note}" for name, note in result["sides"].items()]
        lines += [f"* {note}" for note in result["notes"]]
        lines += [f"* REFUSED, {entry['side']}: {entry['why']}" for entry in result["refused"]]
        lines += [f"* left out: {entry}" for entry in result["left_out"]]
        if result.get("warning"):
            lines.append(f"* WARNING: {result['warning']}")
        if result["rows"]:
            rows = [("test", "label", "ours", "ours ms", "peer", "peer ms", "peer / ours")]
            for row in result["rows"]:
                rows.append((row["test"], row["label"], row["ours"], ms(row["ours_ms"]), row["peer"], ms(row["peer_ms"]), f"{row['peer_over_ours']:.2f}"))
            lines += ["", *columns(rows)]
        for test, spread in result["beside"].items():
            lines.append(f"beside, {result['peer']} alone: {test}: {ms(spread)} ms")
    for line in report["missing"]:
        lines += ["", f"NOT COMPARED: {line}"]
    return "\n".join(lines)


def columns(rows):
    """A Markdown table whose columns line up."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return [text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]]


def as_json(report):
    return json.dumps(report, indent=1)
