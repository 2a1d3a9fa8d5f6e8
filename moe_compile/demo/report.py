from pathlib import Path
def write_report(record, out):
    out.mkdir(parents=True, exist_ok=True)
    record.save(out/"record.json")
    return out/"index.html"
