"python scripts/outputs.py [--run] [PAGE ...]: leave of stored outputs what is the same on every machine; --run makes them anew first."
import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

NBS = Path(__file__).parent.parent/'nbs'
WARNED = re.compile(r'^(\S*\.py):\d+: (\w*Warning: )')  # of a module, or of a kernel's cell
PROGRESS = re.compile(r'\d+%\|.*\| \d+/\d+ \[')  # of a bar
SOME_FOLDER = re.compile(r'/(?:private/)?(?:tmp|var/folders)/(?:[\w-]+/)*?tmp\w{8}')


def without_places(text: str) -> str:
    "Printed text without where and when it was printed: no bars, no library's warnings, no path of a kernel's cell, no temporary folder's name"
    kept, after = [], False
    for line in text.splitlines(keepends=True):
        found = WARNED.match(line)
        source, after = after and line.startswith('  '), bool(found)
        if source or found and 'site-packages' in found[1]: continue  # the line that warned says nothing more
        if PROGRESS.search(line): continue
        kept.append(WARNED.sub(r'\2', line))
    return SOME_FOLDER.sub('TMP', ''.join(kept))


def tidy(nb: dict) -> dict:
    "A notebook with such outputs"
    for cell in nb['cells']:
        if not cell['metadata'].get('tags', True): del cell['metadata']['tags']  # papermill's, where there are none
        for out in cell.get('outputs', []):
            places = [(out, 'text')] if 'text' in out else [(out.get('data', {}), k) for k in out.get('data', {}) if k.startswith('text/')]
            for holder, key in places: holder[key] = without_places(''.join(holder[key])).splitlines(keepends=True)
        if 'outputs' in cell: cell['outputs'] = [o for o in cell['outputs'] if 'text' not in o or ''.join(o['text']).strip()]
    return nb


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('pages', nargs='*', help='names without .ipynb; all pages if there are none')
    p.add_argument('--run', action='store_true', help='run them through papermill first')
    a = p.parse_args()
    if a.run and not a.pages: p.error('--run needs pages')
    for path in [NBS/f'{page}.ipynb' for page in a.pages] or sorted(NBS.glob('*.ipynb')):
        if a.run:
            subprocess.run([sys.executable, '-m', 'papermill', path, path, '-k', 'python3', '--cwd', NBS, '--no-progress-bar'],
                           check=True, stdin=subprocess.DEVNULL)
            subprocess.run(['nbdev_clean', '--fname', path], check=True)
        path.write_text(json.dumps(tidy(json.loads(path.read_text(encoding='utf-8'))), indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
