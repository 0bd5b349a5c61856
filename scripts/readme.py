"Write README.md from nbs/index.ipynb: prose as it is, code and printed output fenced, links from the repository's root."
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def from_root(text: str) -> str:
    "The text of a notebook with its links to notebooks and pictures as seen from the repository's root"
    text = re.sub(r'(!\[[^]]*\]\([^)]*\))\{[^}]*\}', r'\1', text) # what only quarto reads
    return re.sub(r'(\]\(|src=")((?:images/)?[\w.-]+\.(?:ipynb|png|svg|jpg)(?:#[\w.-]*)?)(?=[)"])', r'\1nbs/\2', text)


def readme() -> str:
    parts = []
    for cell in json.loads((ROOT/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(from_root(source))
            continue
        if '#| include: false' in source: continue
        if '#| echo: false' not in source:
            source = '\n'.join(l for l in source.split('\n') if not l.startswith('#|'))
            parts.append(f'```python\n{source}\n```')
        parts += [from_root(''.join(o['data']['text/markdown'])) for o in cell['outputs'] if 'text/markdown' in o.get('data', ())]
        text = ''.join(''.join(o['text']) for o in cell['outputs'] if o['output_type'] == 'stream' and o['name'] == 'stdout')
        if text: parts.append('```\n' + text.rstrip() + '\n```')
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__': (ROOT/'README.md').write_text(readme(), encoding='utf-8')
