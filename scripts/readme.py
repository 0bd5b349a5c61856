"Write the table of all pages into nbs/index.ipynb, and README.md from it: prose as it is, code and output fenced."
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def from_root(text: str) -> str:
    "The text of a notebook with its links to notebooks and pictures as seen from the repository's root"
    text = re.sub(r'(!\[[^]]*\]\([^)]*\))\{[^}]*\}', r'\1', text) # what only quarto reads
    return re.sub(r'(\]\(|src=")((?:images/)?[\w.-]+\.(?:ipynb|png|svg|jpg)(?:#[\w.-]*)?)(?=[)"])', r'\1nbs/\2', text)


def page_table() -> str:
    "A row for each section of the sidebar, with its pages by title"
    title = lambda f: re.match('# (.+)', ''.join(json.loads((ROOT/'nbs'/f).read_text(encoding='utf-8'))['cells'][0]['source']))[1]
    rows, sections = ['| | |', '|--|--------|'], (ROOT/'nbs/sidebar.yml').read_text().split('- section: ')[1:]
    for section in sections:
        links = [f'[{title(f)}]({f})' for f in re.findall(r'[\w-]+\.ipynb', section)]
        rows.append(f"| {section.splitlines()[0].strip()} | {', '.join(links)} |")
    return '\n'.join(rows)


def write_pages():
    "The table of all pages on the home page, as the sidebar and the titles have it"
    index = ROOT/'nbs/index.ipynb'
    home = json.loads(index.read_text(encoding='utf-8'))
    cell = home['cells'][-1]
    text = re.sub(r'(## All pages\n\n).*?(?=\n\n)', lambda m: m[1] + page_table(), ''.join(cell['source']), flags=re.S)
    cell['source'] = text.splitlines(keepends=True)
    index.write_text(json.dumps(home, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


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


if __name__ == '__main__':
    write_pages()
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
