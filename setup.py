"Package metadata comes from settings.ini, which nbdev also reads."
import json
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}
# hpsv2 pins pytest and protobuf, so it stays out of `all`: the score itself only needs open_clip.
extras['all'] = sorted({r for k, v in extras.items() if k not in ('dev', 'hpsv2') for r in v})

def bare(notebook):
    "A notebook without what it has printed"
    nb = json.loads(notebook.read_text(encoding='utf-8'))
    for cell in nb['cells']:
        if cell['cell_type'] == 'code': cell.update(outputs=[], execution_count=None)
    return json.dumps(nb, ensure_ascii=False, indent=1)


class WithNotebooks(build_py):
    "A wheel carries the run notebooks and the examples, which `arpo notebooks DIR` lays out"
    def run(self):
        super().run()
        if self.editable_mode: return
        out = Path(self.build_lib)/'arpo_nb'/'notebooks'
        (out/'examples').mkdir(parents=True, exist_ok=True)
        for p in here.glob('nbs/run_*.ipynb'): (out/p.name).write_text(bare(p), encoding='utf-8')
        for p in here.glob('examples/*.*'): (out/'examples'/p.name).write_bytes(p.read_bytes())


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers',
                 'Intended Audience :: Science/Research', 'Natural Language :: English',
                 'Programming Language :: Python :: 3'],
    packages=find_packages(include=['arpo_nb', 'arpo_nb.*']), package_data={'arpo_nb': ['assets/*', 'py.typed']},
    entry_points={'console_scripts': ['arpo=arpo_nb.training.launch:arpo'],
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(), extras_require=extras,
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    zip_safe=False, cmdclass=dict(build_py=WithNotebooks),
)
